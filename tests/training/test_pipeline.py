"""A whole conversion on eight devices, and a second start in its folder."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from etils import epath
from flax import traverse_util
from one_line import assert_one_line

from arl2_jax.config import (
    Config,
    EvaluationConfig,
    MeshConfig,
    ShortClipsConfig,
    from_config_dict,
    to_config_dict,
)
from arl2_jax.errors import ConfigError, StorageError
from arl2_jax.models import param_shapes, unstack_params, without_delta
from arl2_jax.training import pipeline
from arl2_jax.training.pipeline import control_config, convert, prepare
from arl2_jax.weights import load_params
from arl2_jax.weights.folder import load_params_folder

PHASES = ("teacher", "stage1", "stage2", "control", "control_local")


@pytest.fixture(scope="module")
def config(config, tmp_path_factory):
    """Every phase for two steps, with parameters sharded along every axis."""
    train = dataclasses.replace(
        config.train,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        workdir=str(tmp_path_factory.mktemp("runs") / "run"),
    )
    steps = {
        name: dataclasses.replace(getattr(config, name), steps=2, learning_rate=1e-2, warmup=0)
        for name in ("teacher", "stage1", "stage2")
    }
    steps["stage1"] = dataclasses.replace(
        steps["stage1"], start="least_squares", start_clips=steps["stage1"].batch_size
    )
    return dataclasses.replace(config, train=train, **steps)


@pytest.fixture(scope="module")
def converted(config):
    return convert(config, *prepare(config))


def flat(tree):
    return traverse_util.flatten_dict(jax.device_get(unstack_params(tree)), sep="/")


def assert_equal(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], err_msg=path)


def changed(before, after):
    """Return the paths whose values differ."""
    before, after = flat(before), flat(after)
    assert before.keys() == after.keys()
    return {path for path in before if np.any(before[path] != after[path])}


def assert_one_backbone(converted):
    """All models of a run have the teacher's arrays in common, and their own additions."""
    place = lambda x: x.addressable_shards[0].data.unsafe_buffer_pointer()
    names = ("untrained", "stage1", "stage2", "control", "control_local")
    teachers = [jax.tree.map(place, without_delta(getattr(converted, name))) for name in names]
    assert all(teacher == teachers[0] for teacher in teachers)
    added = [place(getattr(converted, name)["blocks"]["0-0"]["delta"]["phi_v"]) for name in names]
    assert len(set(added)) == len(names)


def test_models_of_a_run_share_the_teacher(converted):
    assert_one_backbone(converted)


def test_everything_is_there(converted, config):
    assert set(converted.seconds) == set(converted.compile_seconds) == set(PHASES)
    assert all(seconds > 0 for seconds in converted.seconds.values())
    stored = json.loads((Path(config.train.workdir) / "config.json").read_text())
    assert from_config_dict(stored) == config


def test_retention_is_kept_before_and_after_each_stage(converted, config):
    """Of the untrained model and of both stages; neither teacher nor control has one."""
    folder = Path(config.train.workdir)
    found = {path.parent.name for path in folder.rglob("retention.json")}
    assert found == {folder.name, "stage1", "stage2"}
    before, after = (
        json.loads((folder / name / "retention.json").read_text()) for name in (".", "stage1")
    )
    assert before["layers"] == list(config.model.hybrid_layers)
    assert before["retention"] != after["retention"]


def test_stage_one_begins_with_its_fit(converted, config):
    """Two steps at this rate move P by about 0.02; the fit has moved it further."""
    folder = Path(config.train.workdir) / "stage1"
    fitted = flat(load_params_folder(folder / "start")[0])
    assert set(fitted) == {
        f"blocks/0/delta/{name}" for name in ("phi_q", "phi_v", "gate_proj/kernel")
    }
    before, after = flat(converted.untrained), flat(converted.stage1)
    for path, value in fitted.items():
        assert np.max(np.abs(after[path] - value)) < 0.025, path
    assert np.max(np.abs(fitted["blocks/0/delta/phi_v"] - before["blocks/0/delta/phi_v"])) > 0.05
    (errors,) = json.loads((folder / "start.json").read_text())["errors"].values()
    assert errors["after"] < errors["before"]


def test_stages_train_what_is_theirs(converted):
    """The softmax weights of every model are the trained teacher's, bit for bit."""
    first = changed(converted.untrained, converted.stage1)
    assert first and all("/delta/" in path and "lora" not in path for path in first)
    second = changed(converted.stage1, converted.stage2)
    assert all("/delta/" in path for path in second)
    assert {"blocks/0/delta/lora_q/b", "blocks/0/delta/lora_fc2/b"} <= second


def test_control_trains_only_what_its_closed_gate_leaves(converted):
    moved = changed(converted.untrained, converted.control)
    assert "blocks/0/delta/lora_fc1/b" in moved
    # The rest has no gradient: it may decay, which leaves zeros at zero.
    for path in ("lora_q/b", "lora_k/b", "lora_v/b", "A_log", "dt_bias"):
        assert f"blocks/0/delta/{path}" not in moved


def test_local_control_trains_what_acts_inside_the_block(converted):
    moved = changed(converted.untrained, converted.control_local)
    for path in ("lora_q/b", "lora_k/b", "lora_v/b", "lora_fc1/b", "phi_q", "phi_v"):
        assert f"blocks/0/delta/{path}" in moved
    # The memory itself has no gradient.
    assert not {f"blocks/0/delta/{path}" for path in ("A_log", "dt_bias")} & moved


@pytest.mark.slow
def test_models_without_low_rank_updates_are_converted(config, tmp_path):
    """Fit, both stages, and a control without any gradient."""
    run = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, lora_rank=0),
        evaluation=dataclasses.replace(config.evaluation, controls=("zero",)),
        train=dataclasses.replace(config.train, workdir=str(tmp_path)),
    )
    made = convert(run, *prepare(run))
    fitted = flat(load_params_folder(tmp_path / "stage1" / "start")[0])
    assert "blocks/0/delta/phi_q" in fitted
    for before, after in ((made.untrained, made.stage1), (made.stage1, made.stage2)):
        moved = changed(before, after)
        assert "blocks/0/delta/phi_v" in moved and all("/delta/" in path for path in moved)
    for model in (made.stage2, made.control):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model))
        assert not any("lora" in path for path in flat(model))


@pytest.mark.parametrize("phase", PHASES)
def test_saved_weights_load(converted, config, phase):
    model = config.model.teacher() if phase == "teacher" else config.model
    loaded = load_params(f"{config.train.workdir}/{phase}/weights", model)
    wanted = without_delta(converted.untrained) if phase == "teacher" else getattr(converted, phase)
    assert_equal(loaded, wanted)


@pytest.mark.parametrize("mesh", [MeshConfig(2, 2, 2), MeshConfig(8, 1, 1)])
def test_finished_run_is_read_not_trained(converted, config, monkeypatch, mesh):
    """Also on another mesh, and with settings that do not affect the weights."""

    def refuse(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(pipeline, "run_phase", refuse)
    train = dataclasses.replace(config.train, mesh=mesh, log_every=7)
    again = dataclasses.replace(config, train=train)
    found = convert(again, *prepare(again))
    assert found.seconds == converted.seconds
    for name in ("untrained", "stage1", "stage2", "control", "control_local"):
        assert_equal(getattr(found, name), getattr(converted, name))
    assert_one_backbone(found)


CHANGES = {
    "model.lora_alpha": lambda c: dict(model=dataclasses.replace(c.model, lora_alpha=3.0)),
    "train.seed": lambda c: dict(train=dataclasses.replace(c.train, seed=9)),
    "stage2.steps": lambda c: dict(stage2=dataclasses.replace(c.stage2, steps=3)),
    "sampler.shift": lambda c: dict(sampler=dataclasses.replace(c.sampler, shift=3.0)),
    "data.frames": lambda c: dict(data=dataclasses.replace(c.data, frames=6)),
    # More clips held out are fewer to train on, and to evaluate on a clip it must be held out.
    "data.held_out": lambda c: dict(data=dataclasses.replace(c.data, held_out=9)),
    "phases": lambda c: dict(phases=("teacher", "stage1")),
}


@pytest.mark.parametrize("field", CHANGES)
def test_folder_of_another_run_is_refused(converted, config, field):
    other = dataclasses.replace(config, **CHANGES[field](config))
    with pytest.raises(ConfigError, match=f"holds a run with {field}=") as caught:
        prepare(other)
    assert_one_line(caught, config.train.workdir, f"set {field}=", "another folder")


# Every group of fields that may differ, each field of it with another value.
RESUMABLE = {
    "train.log_every": lambda c: dict(train=dataclasses.replace(c.train, log_every=7)),
    "train.checkpoint_every": lambda c: dict(
        train=dataclasses.replace(c.train, checkpoint_every=7)
    ),
    "train.keep": lambda c: dict(train=dataclasses.replace(c.train, keep=7)),
    "train.mesh": lambda c: dict(train=dataclasses.replace(c.train, mesh=MeshConfig(4, 1, 2, 1))),
    "train.workdir": lambda c: dict(
        train=dataclasses.replace(c.train, workdir=f"{c.train.workdir}/../run")
    ),
    "evaluation": lambda c: dict(
        evaluation=EvaluationConfig(
            clips=3, recall_clips=4, recall_noises=5, controls=(), rollout_clips=6,
            rollout_length=7,
        )
    ),
}  # fmt: skip


def unfinished_run(config, folder, *, of=""):
    """A run that was stopped after a checkpoint of stage 2, or of a phase in the folder `of`."""
    train = dataclasses.replace(config.train, workdir=str(folder))
    run = dataclasses.replace(config, train=train, phases=("stage1", "stage2"))
    prepare(run)
    (folder / of / "stage2" / "checkpoints" / "2").mkdir(parents=True)
    (folder / "stage1" / "checkpoints" / "2").mkdir(parents=True)
    (folder / "stage1" / "summary.json").write_text("{}")
    return run


@pytest.mark.parametrize("field", pipeline.RESUMABLE_FIELDS)
def test_fields_that_do_not_affect_training_may_differ(config, tmp_path, field):
    run = unfinished_run(config, tmp_path / "run")
    other = dataclasses.replace(run, **RESUMABLE[field](run))
    before, after = to_config_dict(run), to_config_dict(other)
    for name in field.split("."):
        before, after = before[name], after[name]
    assert before != after
    prepare(other)


def with_workers(config, workers):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, workers=workers))


@pytest.mark.parametrize("of", ["", "stage2_60"])
def test_workers_may_not_differ_in_the_middle_of_a_phase(config, tmp_path, of):
    """The position in the data depends on the number of workers; after the phase it is unused."""
    folder = tmp_path / "run"
    run = unfinished_run(config, folder, of=of)
    with pytest.raises(ConfigError, match=r"data\.workers=0, now it is 2") as caught:
        prepare(with_workers(run, 2))
    assert_one_line(caught, folder, "set data.workers=0 again", "another folder")
    prepare(run)
    (folder / of / "stage2" / "summary.json").write_text("{}")
    prepare(with_workers(run, 2))
    # What comes after that is of two workers.
    (folder / "control" / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"data\.workers=2, now it is 0"):
        prepare(run)


def test_fields_of_another_run_come_before_workers(config, tmp_path):
    run = unfinished_run(config, tmp_path)
    (tmp_path / "stage2" / "summary.json").write_text("{}")
    other = dataclasses.replace(run, **CHANGES["train.seed"](run))
    with pytest.raises(ConfigError, match=r"train\.seed=0, now it is 9"):
        prepare(with_workers(other, 2))


def weights_only(config, folder, **train):
    """A run of the teacher's phase alone, and the bytes of its weights."""
    run = dataclasses.replace(
        config,
        phases=("teacher",),
        teacher=dataclasses.replace(config.teacher, steps=6),
        train=dataclasses.replace(config.train, workdir=str(folder), checkpoint_every=2, **train),
    )
    shapes = jax.tree.leaves(param_shapes(config.model.teacher()))
    return run, sum(4 * math.prod(s.shape) for s in shapes)


# Of the state, besides parameters, average and two moments: counters and a key.
COUNTERS = 100


@pytest.mark.parametrize(("keep", "there", "checkpoints"), [
    (1, 0, 2), (2, 0, 3), (3, 0, 3), (9, 0, 3), (2, 1, 2), (2, 2, 1), (2, 3, 1), (3, 3, 0),
])  # fmt: skip
def test_space_for_what_is_still_to_be_written(config, tmp_path, keep, there, checkpoints):
    """Three checkpoints are due; while one is written there is one more than are kept."""
    run, weights = weights_only(config, tmp_path, keep=keep)
    for step in range(there):
        (tmp_path / "teacher" / "checkpoints" / str(step)).mkdir(parents=True)
    found = pipeline.bytes_to_write(run, epath.Path(tmp_path))
    assert 0 <= found - (4 * checkpoints + 1) * weights <= COUNTERS * checkpoints
    (tmp_path / "teacher" / "summary.json").parent.mkdir(exist_ok=True)
    (tmp_path / "teacher" / "summary.json").write_text("{}")
    assert pipeline.bytes_to_write(run, epath.Path(tmp_path)) == 0


def test_space_of_every_phase_is_counted(converted, config, tmp_path):
    """Weights of all five, and a checkpoint of each; none once the run is finished."""
    folder = epath.Path(config.train.workdir)
    assert pipeline.bytes_to_write(config, folder) == 0
    stored = [load_params_folder(folder / phase / "weights")[0] for phase in PHASES]
    weights = sum(value.nbytes for params in stored for value in flat(params).values())
    steps = [int(path.name) for path in folder.glob("*/checkpoints/*")]
    assert steps == [2] * len(PHASES)
    # A checkpoint of the teacher is four times its weights, those of the additions are smaller.
    assert weights < pipeline.bytes_to_write(config, epath.Path(tmp_path)) < 5 * weights


def test_disk_that_is_too_small_is_refused_before_anything_is_compiled(
    config, tmp_path, monkeypatch
):
    run, _ = weights_only(config, tmp_path)
    needed, reads = pipeline.bytes_to_write(run, epath.Path(tmp_path)), []
    initial = pipeline._initial_params
    monkeypatch.setattr(pipeline, "_initial_params", lambda *a: reads.append(1) or initial(*a))
    for free in (0, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(free))
        with pytest.raises(StorageError, match="GiB free") as caught:
            prepare(run)
        assert_one_line(caught, tmp_path, "another folder")
        assert not reads and not (tmp_path / "config.json").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(needed))
    prepare(run)
    assert reads


class Usage(NamedTuple):
    free: int


def test_batch_that_devices_cannot_share_is_refused_first(config: Config, tmp_path):
    stage1 = dataclasses.replace(config.stage1, start="random", batch_size=6)
    train = dataclasses.replace(config.train, workdir=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"stage1\.batch_size=6"):
        prepare(dataclasses.replace(config, stage1=stage1, train=train))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("gate", ["zero", "local"])
def test_controls_of_a_fitted_run_are_configurations_themselves(config, gate):
    """Controls have no fit before stage 1, so its settings must not refuse them."""
    fitted = dataclasses.replace(
        config, stage1=dataclasses.replace(config.stage1, start="least_squares")
    )
    found = control_config(fitted, gate)
    assert found.model.memory_gate == gate and found.stage2.layer_loss == 0
    assert found.stage2.steps == config.stage2.steps and found.data == config.data


@pytest.mark.parametrize(("share", "steps"), [(1.0, 10), (0.5, 5), (0.25, 3), (1e-9, 1)])
def test_controls_take_their_share_of_the_steps(config, share, steps):
    stage2 = dataclasses.replace(config.stage2, steps=10, short_steps=8, control_share=share)
    data = dataclasses.replace(config.data, short=ShortClipsConfig(frames=2))
    found = control_config(dataclasses.replace(config, data=data, stage2=stage2), "zero").stage2
    # Their learning rate falls to its end within their own steps, and short clips keep their share.
    assert found.steps == steps and found.short_steps == round(0.8 * steps)
    as_before = dataclasses.replace(found, steps=10, short_steps=8)
    assert as_before == dataclasses.replace(stage2, layer_loss=0.0)


def test_short_clips_that_cannot_be_sharded_are_refused(config, tmp_path):
    """Before anything is compiled, like those of full length."""
    run = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, frames=8, short=ShortClipsConfig(frames=2)),
        teacher=dataclasses.replace(config.teacher, short_steps=2),
        train=dataclasses.replace(
            config.train, workdir=str(tmp_path), mesh=MeshConfig(data=4, context=2)
        ),
    )
    wanted = r"context=2 must divide the 1 frame blocks of a clip, data\.short\.frames"
    with pytest.raises(ConfigError, match=wanted):
        prepare(run)
    prepare(dataclasses.replace(run, teacher=config.teacher))


@pytest.mark.parametrize("phases", [("teacher", "stage1"), ("stage1", "stage2")])
def test_random_teacher_that_is_not_trained_predicts_something(config, tmp_path, phases):
    """A head that starts at zero and is not trained would leave stage 2 without a target."""
    train = dataclasses.replace(config.train, workdir=str(tmp_path))
    run = dataclasses.replace(config, phases=phases, train=train)
    _, _, params = prepare(run)
    assert np.any(params["head"]["linear"]["kernel"]) == ("teacher" not in phases)
