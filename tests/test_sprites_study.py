"""The study's jobs, what it carries from call to call, and its tables and pictures."""

import io
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from one_line import assert_one_line
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from sprites_study_plots import draw  # noqa: E402
from study.clock import Claims, Clock  # noqa: E402
from study.collect import collect, markdown, merge  # noqa: E402
from study.plots import rollout_sheet  # noqa: E402
from study.recipes import (  # noqa: E402
    all_jobs,
    base_config,
    changed,
    conversion_config,
    parse_changes,
    parse_job,
    teacher_config,
    variants,
)
from study.stored import Folder, load_student, save_student, save_teacher  # noqa: E402

from arl2_jax import models  # noqa: E402
from arl2_jax.config import short_run, to_config_dict  # noqa: E402
from arl2_jax.data import sprites  # noqa: E402
from arl2_jax.errors import ConfigError  # noqa: E402
from arl2_jax.training.partition import merge_params  # noqa: E402
from arl2_jax.weights import load_params  # noqa: E402


def test_jobs_are_read_back_and_stand_in_order():
    names = all_jobs([0, 1, 2], [0])
    jobs = [parse_job(name) for name in names]
    assert len(set(names)) == len(names) and [job.name for job in jobs] == names
    made = set()
    for job in jobs:
        if job.kind != "teacher":
            assert f"teacher-t{job.teacher}" in made
        if job.kind in ("rollout", "long_recall") and job.conversion:
            assert job.conversion in made
        made.add(job.name)
    ranked = [job for job in jobs if job.kind == "ranking"]
    assert [(job.teacher, job.seed) for job in ranked] == [(0, 0), (0, 1), (0, 2)]
    assert parse_job("rollout_p75_by_block-t0-s2").conversion == "p75_by_block-t0-s2"
    assert parse_job("rollout_teacher-t1").conversion is None
    assert parse_job("long_recall_all_by_block_long-t0-s1").conversion == "all_by_block_long-t0-s1"
    assert parse_job("long_recall_teacher-t1")[1:] == ("long_recall", None, 1, 1)
    assert "all_by_block-t5-s1" in all_jobs([0, 1], [4, 5])


@pytest.mark.parametrize(
    "name",
    [
        "teacher",
        "teacher-t0-s0",
        "all_by_block-t0",
        "nothing-t0-s0",
        "rollout_teacher-t0-s1",
        "long_recall_nothing-t0-s0",
        "ranking-t0",
    ],
)
def test_unknown_jobs_are_refused(name):
    with pytest.raises(ConfigError) as error:
        parse_job(name)
    assert_one_line(error, "jobs=")


@pytest.mark.parametrize("size", ["full", "quick"])
def test_every_configuration_holds(size):
    base = base_config(size, {})
    assert base.model.delta.block_tokens == base.model.frames_per_block * base.tokens_per_frame
    for phase in ("teacher", "stage2"):
        sprites.check(short_run(base, phase))
    sprites.check(teacher_config(base, 3, "runs/x"))
    for variant in variants():
        config = conversion_config(base, variant, 1, "runs/x")
        assert config.model.delta.block_tokens == base.model.delta.block_tokens
        half = 1 if variant.endswith("_long") else 2
        assert config.stage2.steps == base.stage2.steps // half
    share = {v: len(conversion_config(base, v, 0, "x").model.hybrid_layers) for v in variants()}
    assert (share["all_by_block"], share["p75_published"], share["p50_by_block"]) == (4, 3, 2)


def test_the_full_task_is_as_dense_as_it_says():
    base = base_config("full", {})
    assert 1560 <= base.model.delta.block_tokens <= 4680
    assert base.model.head_dim == 128 and base.blocks >= 18
    # In float16 a teacher is one file that travels.
    size = sum(x.size for x in jax.tree.leaves(models.param_shapes(base.model.teacher())))
    assert 2 * size < 15e6


def test_changes():
    assert parse_changes(["teacher.steps=3", "data.codec=wan_vae", "a.b.c=(1, 2)"]) == {
        "teacher.steps": 3, "data.codec": "wan_vae", "a.b.c": (1, 2),
    }  # fmt: skip
    base = base_config("quick", {"teacher.steps": 3})
    assert base.teacher.steps == 3 and base.data.workers == 0
    for changes in ({"teacher.stepz": 1}, {"nowhere.x": 1}, {"teacher.steps.x": 1}):
        with pytest.raises(ConfigError) as error:
            changed(base, changes)
        assert_one_line(error, "unknown")
    with pytest.raises(ConfigError, match="must be FIELD=VALUE"):
        parse_changes(["teacher.steps"])


def test_weights_travel(tmp_path, cfg, params):
    teacher = models.without_delta(params)
    save_teacher(tmp_path / "teacher", teacher, cfg.teacher())
    save_student(tmp_path / "student.npz", params)
    read = load_params(tmp_path / "teacher", cfg.teacher())
    both = merge_params(read, load_student(tmp_path / "student.npz"))
    assert jax.tree.structure(both) == jax.tree.structure(params)
    # Half a unit in the last of float16's 11 binary places.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2**-11), both, params)


def test_claims(tmp_path):
    claims = Claims(tmp_path)
    assert claims.take("a") and not claims.others("a") and claims.take("a")
    (tmp_path / "b").write_text(str(os.getppid()))
    assert claims.others("b") and not claims.take("b")
    # No process has this number.
    (tmp_path / "c").write_text(str(2**22 + 1))
    assert not claims.others("c") and claims.take("c")
    claims.release("a")
    assert not (tmp_path / "a").exists()
    assert Clock(None).left() == float("inf") and 59 < Clock(1).left() <= 60


def made_up(name):
    """A result with the fields that a run has; what it says is nonsense."""
    job = parse_job(name)
    common = {"kind": job.kind, "variant": job.variant, "teacher": job.teacher, "seed": job.seed}
    config = to_config_dict(
        conversion_config(base_config("quick", {}), "all_by_block", job.seed, "x")
    )
    common |= {"config": config, "device": {"kind": "none"}, "versions": {}}
    rng = np.random.default_rng(job.seed)
    share = lambda: float(rng.uniform())
    if job.kind == "ranking":
        return common | {"spearman": {"swap": {"swap_after_stage2": 0.5 - job.seed},
                                      "exchange": {"swap_after_stage2": None}}}  # fmt: skip
    if job.kind == "rollout":
        row = lambda: {"right": share(), "interval": [0, 1], "videos": 4, "count": 9}
        part = lambda a, b: {"blocks": [a, b], "seen": 0.1, "nothing": 0.5} | row()
        back = lambda right: {name: row() | right for name in ("returns", "same")}
        drift = [part(0, 0) | back({"right": None}), part(1, 2) | back({})]
        return common | {"truth": [part(0, 3)], "drift": drift}
    if job.kind == "long_recall":
        none = {"blocks": [2, 17], "recall": None, "interval": None, "videos": 0, "count": 0}
        some = {"blocks": [44, 59], "recall": 0.75, "interval": [0, 1], "videos": 4, "count": 9}
        return common | {"long_recall": [none, some]}
    outcome = lambda: {name: share() for name in ("own", "twin", "other", "nothing")}
    exchange = {"none": outcome(), "states": outcome(), "caches": None, "zeroed": outcome(),
                "carried": {"states": share(), "caches": None}}  # fmt: skip
    result = common | {
        "recall": {"recall": share()}, "exchange": exchange, "baseline": 0.1, "clips": 32,
        "recall_by_lag": {str(lag): {"recall": share(), "clips": 2} for lag in range(1, 17)},
        "loss": share(),
    }  # fmt: skip
    if job.kind == "teacher":
        return result | {"curves": {"teacher": [{"step": 10, "loss": 0.5}]}}
    table = [[share(), share()]] * 4
    kept = dict.fromkeys(("retention", "tokens", "read_to_local", "load"), table)
    kept |= {"layers": [0, 1, 2, 3], "tokens_per_block": 40, "head_dim": 32, "blocks_per_clip": 8}
    result |= {"curves": {"stage2": [{"step": 10, "loss": 0.5}, {"step": 20, "loss": 0.1}]}}
    return result | {"errors": {"student": 0.1}, "retention": {"untrained": kept, "student": kept}}


RUNS = (
    "teacher-t0", "all_by_block-t0-s0", "all_by_block-t0-s1", "additive-t0-s0",
    "rollout_all_by_block-t0-s0", "rollout_teacher-t0", "long_recall_all_by_block-t0-s0",
    "all_by_block_long-t0-s0", "ranking-t0-s0", "ranking-t0-s1",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs():
    return {name: made_up(name) for name in RUNS}


def test_tables_of_merged_results(runs):
    merged = json.loads(json.dumps(merge(runs)))
    model = merged["summary"]["models"]["all_by_block"]
    pair = [runs[name]["recall"]["recall"] for name in RUNS[1:3]]
    assert (
        model["recall"]["share"] == pytest.approx(np.mean(pair)) and model["recall"]["clips"] == 64
    )
    assert model["seeds"] == [[0, 0], [0, 1]] and "caches" not in model["exchange"]
    assert merged["summary"]["spearman"]["swap"]["mean"] == 0
    assert merged["summary"]["spearman"]["exchange"]["mean"] is None
    assert merged["runs"]["all_by_block-t0-s1"]["changes"] == ["train.seed is 0 there and 1 here"]
    text = markdown(merged["summary"])
    for needed in ("| teacher | 1 |", "| all_by_block | 2 |", "| 2 to 3 |", "| swap | +0.00 |"):
        assert needed in text
    assert "| all_by_block | 45 to 60 | 75 (30 to 95) |" in text


def test_results_are_added_to_those_before(runs, tmp_path):
    out, file = Folder(str(tmp_path / "study")), tmp_path / "merged.json"

    def add(found):
        for name, run in found.items():
            out.result(name).write_text(json.dumps(run))
        collect(out, str(file))
        for name in found:
            out.result(name).unlink()
        return json.loads(file.read_text())

    first, second = (dict(list(runs.items())[part]) for part in (slice(0, 4), slice(4, None)))
    add(first)
    assert add(second) == json.loads(json.dumps(merge(runs)))
    again = second["long_recall_all_by_block-t0-s0"] | {"seconds_long_recall": 7.0}
    merged = add({"long_recall_all_by_block-t0-s0": again})
    assert len(merged["runs"]) == len(runs)
    assert merged["runs"]["long_recall_all_by_block-t0-s0"]["seconds_long_recall"] == 7.0
    with pytest.raises(ConfigError, match="has no results"):
        collect(out, str(file))
    out.result("teacher-t0").write_text(json.dumps(runs["teacher-t0"]))
    file.write_text("[]")
    with pytest.raises(ConfigError, match="does not hold merged results"):
        collect(out, str(file))
    assert file.read_text() == "[]"


@pytest.mark.slow  # ten pictures
def test_pictures_of_merged_results(runs):
    pictures = draw(json.loads(json.dumps(merge(runs))))
    assert all(pictures.values())
    frames = np.zeros((2, 3, 8, 8, 3), np.uint8)
    for png in [*pictures.values(), rollout_sheet(np.array([1, 9]), frames, frames[0])]:
        assert min(Image.open(io.BytesIO(png)).size) > 100
    nothing = draw(merge({"ranking-t0-s0": made_up("ranking-t0-s0")}))
    assert not any(nothing.values())
