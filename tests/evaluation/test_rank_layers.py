"""Layers with planted faults get the right ranks; files are complete; bad input is refused."""

import dataclasses
import functools
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_line import assert_one_line
from PIL import Image

from arl2_jax import sharding
from arl2_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    SamplerConfig,
    SpriteConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
    TrainConfig,
    to_config_dict,
)
from arl2_jax.errors import ConfigError, UserError
from arl2_jax.evaluation.rank_choice import RankChoice, chosen_measures
from arl2_jax.evaluation.rank_layers import rank_layers
from arl2_jax.evaluation.ranking import MEASURES, hybrid_count, rank, ranking_table, ranks, spearman
from arl2_jax.evaluation.ranking_plot import ranking_picture
from arl2_jax.evaluation.swap import swap_errors, swapped_flow
from arl2_jax.models import init_params, without_delta
from arl2_jax.training import losses
from arl2_jax.weights.folder import save_params

ROOT = Path(__file__).parents[2]
SAMPLER = SamplerConfig(timesteps=(1000.0, 500.0))
KEY = jax.random.key(0)
# What the attention of each layer is multiplied by, in the planted models.
SCALES = (1.0, 0.0, 0.1)


def plant(params):
    """Scales the output projection of every layer by `SCALES`."""
    layers = {}
    for i, scale in enumerate(SCALES):
        layer = params["blocks"][str(i)]
        output = jax.tree.map(lambda x, c=scale: c * x, layer["self_attn"]["o"])
        layers[str(i)] = layer | {"self_attn": layer["self_attn"] | {"o": output}}
    return params | {"blocks": layers}


def softmax_params(cfg, make_params):
    """A planted softmax model, and memories at their start, whose low-rank updates are zero."""
    params, fresh = plant(make_params(cfg)), init_params(cfg, KEY)
    for i, layer in params["blocks"].items():
        layer["delta"] = fresh["blocks"][i]["delta"]
    return params


@pytest.fixture(scope="module")
def every(cfg):
    return dataclasses.replace(cfg, hybrid_layers=(0, 1, 2))


@pytest.fixture(scope="module")
def clips(make_clip, cfg):
    clip = make_clip(cfg)
    return {"latents": np.asarray(clip.clean), "text": np.asarray(clip.text)}


@pytest.mark.slow
def test_the_flow_of_a_swap_is_that_of_the_model_with_one_hybrid_layer(
    every, make_params, clip, error
):
    params = make_params(every)
    noised = losses.NoisedClip(
        clip.clean, clip.noisy, jnp.zeros_like(clip.noisy), clip.timestep / 1000, clip.text
    )
    swap = jax.jit(swapped_flow, static_argnums=1)
    alone = jax.jit(losses.predict, static_argnums=1)
    found = [swap(params, every, jnp.int32(i), noised) for i in range(3)]
    assert swap._cache_size() == 1, "one compilation serves all layers"
    for i in (0, 2):
        cfg = dataclasses.replace(every, hybrid_layers=(i,))
        layers = without_delta(params)["blocks"] | {str(i): params["blocks"][str(i)]}
        wanted, _ = alone(params | {"blocks": layers}, cfg, noised)
        # Errors of float32 rounding, in another order of sums.
        assert error(found[i], wanted) < 1e-5
    assert min(error(found[i], found[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_swaps_are_as_large_as_what_was_planted(every, make_params, clips):
    errors = swap_errors(softmax_params(every, make_params), every, clips, SAMPLER, KEY)
    # Zero but for float32 rounding of two programs, squared.
    assert errors[1] < 1e-11 and errors[0] > 3 * errors[2] > 1e-8
    assert ranks("swap", errors).tolist() == [1, 3, 2]


def test_only_whole_hybrids_can_be_swapped(cfg, params, clip, unchecked):
    with pytest.raises(ValueError, match="must be all 3 layers"):
        swapped_flow(params, cfg, jnp.int32(0), clip)


def test_ranks_follow_need_and_share_ties():
    assert ranks("swap", [0.1, 3, 0.1, 2]).tolist() == [3.5, 1, 3.5, 2]
    assert ranks("retention", [0.1, 3, 0.1, 2]).tolist() == [1.5, 4, 1.5, 3]
    assert ranks("exchange", [0, 0, 0]).tolist() == [2, 2, 2]


def test_spearman_is_pearson_of_ranks():
    one, other = np.array([1, 2, 3, 4.0]), np.array([1, 3, 2, 4.0])
    # 1 - 6 sum d^2 / (n (n^2 - 1)) without ties.
    assert spearman(one, other) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert spearman(one, one[::-1]) == pytest.approx(-1)
    assert spearman(one, np.full(4, 2.5)) is None


@pytest.mark.parametrize(
    ("share", "layers", "count"), [(0.75, 30, 22), (0.5, 30, 15), (0.7, 10, 7), (1, 3, 3)]
)
def test_shares_are_those_of_the_paper(share, layers, count):
    assert hybrid_count(share, layers) == count


def make_ranking(layers=4, by="swap", share=0.5, names=tuple(MEASURES)):
    rng = np.random.default_rng(0)
    values = {name: np.exp(rng.normal(-5, 3, layers)).tolist() for name in names}
    return rank(values, by, share)


def test_the_least_needy_layers_are_converted():
    found = rank({"swap": [0.1, 5, 0.2, 0.1], "retention": [0.9, 0.1, 0.2, 0.8]}, "swap", 0.5)
    assert found["order"] == [1, 2, 3, 0], "of equal layers the later one keeps softmax"
    assert found["hybrid_layers"] == [0, 3] and found["softmax_layers"] == [1, 2]
    # Ranks 3.5 1 2 3.5 and 4 1 2 3.
    assert found["spearman"]["swap"]["retention"] == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    one = rank({"retention": [0.9, 0.1, 0.2]}, "retention", 0.4)
    assert one["hybrid_layers"] == [0]
    assert rank({"swap": [1.0, 2.0]}, "swap", 1)["softmax_layers"] == []


def test_the_table_has_every_layer_in_80_columns():
    ranking = make_ranking(layers=30)
    lines = ranking_table(ranking).splitlines()
    assert max(map(len, lines)) <= 80
    rows = [line.split() for line in lines[1:31]]
    assert [int(row[0]) for row in rows] == ranking["order"]
    kept = [int(row[0]) for row in rows if row[1] == "softmax"]
    assert sorted(kept) == ranking["softmax_layers"] and len(kept) == 15
    assert "swap / exchange" in " ".join(lines[32:])


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int)


@pytest.mark.slow
def test_the_picture_shows_every_measure_and_layer():
    ranking = make_ranking()
    base, seen = pixels(ranking_picture(ranking)), []
    for name in MEASURES:
        flat = ranking["measures"] | {name: [1.0, 1.0, 1.0, 1.0]}
        changed = (pixels(ranking_picture(ranking | {"measures": flat})) != base).any(axis=2)
        seen.append(np.argwhere(changed)[:, 0].mean())
    assert np.all(np.diff(seen) > 50)
    for names, layers in ((["swap"], 1), (list(MEASURES), 40)):
        pixels(ranking_picture(make_ranking(layers, share=1, names=names)))
    pixels(ranking_picture(rank({"exchange": [0.0, 0.0]}, "exchange", 0.5)))


@pytest.fixture(scope="module")
def config(tmp_path_factory, make_params):
    """A run on sprites whose teacher has planted layers."""
    folder = tmp_path_factory.mktemp("ranked")
    model = ModelConfig(
        dim=16, ffn_dim=24, num_heads=2, num_layers=3, freq_dim=8, text_dim=8, text_len=4,
        in_dim=12, out_dim=12, hybrid_layers=(0,), frames_per_block=2, lora_rank=2,
    )  # fmt: skip
    phase = dict(steps=2, batch_size=8, learning_rate=1e-3, warmup=1)
    teacher = plant(make_params(model.teacher()))
    save_params(folder / "teacher" / "weights", teacher, to_config_dict(model.teacher()))
    (folder / "teacher" / "summary.json").write_text("{}")
    config = Config(
        model,
        SAMPLER,
        DataConfig(
            frames=16, height=8, width=32, held_out=8,
            sprites=SpriteConfig(count=(1, 1), pause=(0, 4)),
        ),
        teacher=TeacherConfig(),
        stage1=Stage1Config(**phase),
        stage2=Stage2Config(**phase),
        train=TrainConfig(workdir=str(folder)),
        evaluation=EvaluationConfig(clips=4, recall_clips=4, recall_noises=1, rollout_clips=0),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(to_config_dict(config)))
    weights = dataclasses.replace(config.teacher, weights=str(folder / "teacher" / "weights"))
    return dataclasses.replace(config, teacher=weights)


make_mesh = sharding.make_mesh


def on_devices(patch, count):
    """Programs for all eight devices take three times as long to compile as for one."""
    devices = jax.devices()[:count]
    patch.setattr(sharding, "make_mesh", functools.partial(make_mesh, devices=devices))


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, 1)
        yield


@pytest.fixture(scope="module")
def ranking(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "ranking"
    return out, rank_layers(config, out, RankChoice(by="swap", share=0.67))


def test_planted_layers_are_ranked_and_files_are_whole(ranking):
    out, found = ranking
    assert list(found["measures"]) == ["layer_error", "retention", "swap", "exchange"]
    measures = found["measures"]
    # The error is relative to the layer's own output: the small constant keeps 0 / 0 at 0.
    assert measures["layer_error"][1] == 0 < measures["layer_error"][0]
    assert measures["swap"][1] < 1e-11 and measures["exchange"][1] == 0
    assert found["order"] == [0, 2, 1] and found["softmax_layers"] == [0]
    assert all(0 < share < 1 for share in measures["retention"])
    assert set(found["exchange"]["layers"]) == {"0", "1", "2"}
    assert set(found["seconds"]) == {"stage1", *measures}
    assert json.loads((out / "ranking.json").read_text()) == found
    assert Image.open(out / "ranking.png").size[0] > 400
    assert found["config"]["model"]["hybrid_layers"] == [0, 1, 2]


def test_a_second_start_reads_what_was_trained(ranking, config):
    out, found = ranking
    again = rank_layers(config, out, RankChoice(measures=("swap",), share=0.4))
    assert again["measures"]["swap"] == found["measures"]["swap"] and again["by"] == "swap"
    assert again["hybrid_layers"] == [1] and again["exchange"] is None


def test_a_folder_of_another_ranking_is_refused(ranking, config):
    longer = dataclasses.replace(config, stage1=dataclasses.replace(config.stage1, steps=3))
    with pytest.raises(ConfigError) as error:
        rank_layers(longer, ranking[0], RankChoice())
    assert_one_line(error, "stage1.steps=2", "train.workdir", "another folder")


@pytest.mark.slow
def test_layers_are_trained_alone_for_the_most_expensive_measure(ranking, config):
    out, found = ranking
    choice = RankChoice(measures=("swap",), stage2_steps=3)
    after = rank_layers(config, out, choice)
    assert list(after["measures"]) == ["swap", "swap_after_stage2"]
    assert after["by"] == "swap_after_stage2"
    trained, before = after["measures"]["swap_after_stage2"], found["measures"]["swap"]
    assert trained[0] > 0 and trained[0] != before[0]
    assert len(list((out / "stage2_3").iterdir())) == 3
    assert rank_layers(config, out, choice)["measures"] == after["measures"]


@pytest.mark.slow
def test_devices_that_share_the_work_change_nothing(ranking, config, tmp_path, monkeypatch):
    on_devices(monkeypatch, 2)
    found = rank_layers(config, tmp_path / "out", RankChoice(by="swap", stage2_steps=2))
    assert found["by"] == "swap" and found["order"] == ranking[1]["order"]
    for name, values in ranking[1]["measures"].items():
        # Two steps of training amplify float32 rounding, in another order of sums; what is zero
        # but for rounding is that of two programs, squared.
        np.testing.assert_allclose(found["measures"][name], values, rtol=1e-3, atol=1e-11)


@pytest.mark.slow
def test_the_command_ranks_the_teacher_of_a_run(config, tmp_path):
    run = Path(config.train.workdir)
    done = command(
        f"--run={run}", "--measures=layer_error", "--stage1_steps=1", f"--out={tmp_path / 'out'}"
    )
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "out" / "ranking.json").read_text())
    hybrid = tuple(stored["hybrid_layers"])
    assert f"--config.model.hybrid_layers='{hybrid}'" in done.stdout
    assert stored["by"] == "layer_error"
    assert stored["config"]["stage1"]["steps"] == 1


def command(*arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "rank_layers.py"), *arguments],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (dict(share=0.0), "share=0 must be in (0, 1]"),
        (dict(share=1.1), "share=1.1 must be in (0, 1]"),
        (dict(share=0.3), "at least one of the 3 layers"),
        (dict(measures=("swap", "swop")), "measures=swop is unknown"),
        (dict(by="swop"), "by=swop is unknown"),
        (dict(measures=("swap",), by="retention"), "by=retention is not among measures=swap"),
        (dict(measures=("swap_after_stage2",)), "stage2_steps above 0"),
        (dict(stage2_steps=-1), "stage2_steps=-1"),
    ],
)
def test_what_cannot_be_ranked_is_refused(config, tmp_path, choice, message):
    out = tmp_path / "out"
    with pytest.raises(ConfigError) as error:
        rank_layers(config, out, RankChoice(**choice))
    assert_one_line(error, message)
    assert not out.exists()


def change(config, part, **changes):
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **changes)}
    )


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("teacher", dict(weights="random"), "teacher.weights=random is an untrained model"),
        ("teacher", dict(weights="nowhere"), "nowhere"),
        ("data", dict(frames=2), "clips of one block"),
        ("model", dict(memory_gate="zero"), "model.memory_gate=zero"),
    ],
)
def test_runs_that_cannot_be_ranked_are_refused(config, tmp_path, part, changes, message):
    run = change(config, part, **changes)
    with pytest.raises(UserError) as error:
        rank_layers(run, tmp_path / "out", RankChoice(stage2_steps=2))
    assert_one_line(error, message)


def test_batches_that_devices_cannot_share_are_refused(config, tmp_path, monkeypatch):
    on_devices(monkeypatch, 2)
    run = change(config, "stage2", batch_size=3)
    with pytest.raises(ConfigError) as error:
        rank_layers(run, tmp_path / "out", RankChoice(stage2_steps=2))
    assert_one_line(error, "stage2.batch_size=3")


def test_the_exchange_needs_clips_with_ground_truth(config, tmp_path):
    latents = change(config, "data", source="latents", path=str(tmp_path))
    without = change(config, "evaluation", recall_clips=0)
    for run, message in ((latents, "data.source=latents"), (without, "recall_clips=0")):
        with pytest.raises(ConfigError) as error:
            rank_layers(run, tmp_path / "out", RankChoice(measures=("exchange",)))
        assert_one_line(error, "measures=exchange", message)
        names, by = chosen_measures(run, RankChoice())
        assert names == ("layer_error", "retention", "swap") and by == "swap"


@pytest.mark.parametrize(
    ("hybrid", "message"), [((0, 1, 2), "leave none softmax"), ((1,), "leave 2 of 3 softmax")]
)
def test_hybrid_weights_are_refused(config, tmp_path, make_params, hybrid, message):
    cfg = dataclasses.replace(config.model, hybrid_layers=hybrid)
    save_params(tmp_path / "weights", make_params(cfg), to_config_dict(cfg))
    run = change(config, "teacher", weights=str(tmp_path / "weights"))
    with pytest.raises(ConfigError) as error:
        rank_layers(run, tmp_path / "out", RankChoice())
    assert_one_line(error, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "config"),
        (["--run=a", "--config=b"], "config"),
        (["--run=nowhere"], "nowhere is not the folder of a run"),
        ([f"--config={ROOT / 'configs' / 'tiny.py'}", "--config.stage1.stepz=3"], "stepz"),
        ([f"--config={ROOT / 'configs' / 'tiny.py'}"], "teacher.weights=random"),
    ],
)
def test_wrong_flags_are_one_line(arguments, message):
    done = command(*arguments)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and message in done.stderr
