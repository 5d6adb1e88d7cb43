"""Table, picture and command of retention, on stored weights."""

import dataclasses
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from one_line import assert_one_line
from PIL import Image
from tiny_release import MODEL, random_tree

from arl2_jax.config import GatedDeltaConfig, to_config_dict
from arl2_jax.data import LatentWriter
from arl2_jax.errors import ConfigError, UserError
from arl2_jax.evaluation.inspect_memory import ClipChoice, inspect_memory, read_clips
from arl2_jax.evaluation.retention import retention_of_models, retention_table
from arl2_jax.evaluation.retention_plot import retention_picture, short
from arl2_jax.models import init_params, param_shapes
from arl2_jax.training.retention import retention
from arl2_jax.weights.folder import save_params

ROOT = Path(__file__).parents[2]
HYBRID = dataclasses.replace(MODEL, hybrid_layers=(1,), delta=GatedDeltaConfig(block_tokens=24))
RANDOM = ClipChoice(clips=2, blocks=3, latent_shape=(4, 8))


def make_measures(layers, heads, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.uniform(low, high, (layers, heads)).tolist()
    return {
        "layers": list(range(layers)), "tokens_per_block": 4680, "head_dim": 128,
        "blocks_per_clip": 7, "retention": np.power(10.0, draw(-45, 0)).tolist(),
        "load": draw(0, 72), "tokens": draw(0, 32760), "read_to_local": draw(0, 120),
    }  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run's folder with a converted model, and its parameters."""
    folder = tmp_path_factory.mktemp("run")
    params = random_tree(param_shapes(HYBRID))
    save_params(folder / "stage2" / "weights", params, to_config_dict(HYBRID))
    return folder, params


@pytest.fixture(scope="module")
def softmax(tmp_path_factory):
    """A folder of weights without hybrid layers."""
    folder = tmp_path_factory.mktemp("teacher") / "weights"
    save_params(folder, random_tree(param_shapes(MODEL)), to_config_dict(MODEL))
    return str(folder)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Three stored clips of 4 frames."""
    folder = tmp_path_factory.mktemp("latents") / "clips"
    rng = np.random.default_rng(1)
    with LatentWriter(folder, (4, 4, 8, 4), (8, 32), dtype="float32") as writer:
        for _ in range(3):
            writer.write(rng.standard_normal((4, 4, 8, 4)), rng.standard_normal((8, 32)))
    return str(folder)


def test_the_command_measures_a_run(saved, tmp_path):
    folder, params = saved
    out = tmp_path / "memory.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "inspect_memory.py"), f"--run={folder}",
         "--latent_shape=4,8", "--clips=2", "--blocks=3", f"--out={out}"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the memory was started for blocks of 24: set latent_shape" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[2].split()[0] == "1" and all(len(line) <= 80 for line in lines[:3])
    assert str(out) in lines[-1] and Image.open(tmp_path / "memory.png").size[0] > 500
    # The same as the library says of the same parameters and clips.
    wanted = retention(params, HYBRID, read_clips(RANDOM, HYBRID))
    found = json.loads(out.read_text())
    assert found.keys() == wanted.keys() and found["layers"] == [1]
    for name in ("retention", "tokens", "load", "read_to_local"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, err_msg=name)


def test_softmax_weights_are_measured_with_untrained_memories(softmax, tmp_path):
    out = tmp_path / "a.json"
    found = inspect_memory(softmax, RANDOM, out, hybrid_layers=(0, 1), seed=3)
    cfg = dataclasses.replace(MODEL, hybrid_layers=(0, 1))
    fresh = init_params(cfg, jax.random.key(3))
    params = random_tree(param_shapes(MODEL))
    for i, layer in params["blocks"].items():
        layer["delta"] = fresh["blocks"][i]["delta"]
    wanted = retention(params, cfg, read_clips(RANDOM, cfg, 3))
    np.testing.assert_allclose(found["retention"], wanted["retention"], rtol=1e-5)
    assert json.loads(out.read_text()) == found


def test_stored_clips_are_cut_to_blocks(latents):
    choice = ClipChoice(latents, clips=2)
    whole = read_clips(choice, MODEL)
    assert whole["latents"].shape == (2, 4, 4, 8, 4) and whole["text"].shape == (2, 8, 32)
    part = read_clips(dataclasses.replace(choice, clips=1, blocks=3), MODEL)
    np.testing.assert_array_equal(part["latents"], whole["latents"][:1, :3])
    threes = dataclasses.replace(MODEL, frames_per_block=3)
    assert read_clips(choice, threes)["latents"].shape[1] == 3  # the fourth is no whole block


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (dict(clips=4), "clips=4 is more than the 3"),
        (dict(blocks=5), "blocks=5 of 1 frames are more than the 4"),
        (dict(data=None, latent_shape=(5, 8)), "latent_shape=5,8"),
        (dict(data=None, latent_shape=(0, 8)), "latent_shape=0,8"),
        (dict(blocks=0), "blocks=0 must be positive"),
        (dict(clips=0), "clips=0 must be positive"),
    ],
)
def test_clips_that_cannot_be_are_refused(latents, choice, message):
    with pytest.raises(ConfigError) as error:
        read_clips(ClipChoice(**{"data": latents} | choice), MODEL)
    assert_one_line(error, message)


def test_clips_of_another_model_are_refused(latents):
    for changes in (dict(in_dim=8), dict(text_len=9), dict(patch_size=(1, 3, 2))):
        with pytest.raises(ConfigError) as error:
            read_clips(ClipChoice(latents), dataclasses.replace(MODEL, **changes))
        assert_one_line(error, latents)
    with pytest.raises(ConfigError) as error:
        read_clips(ClipChoice(latents), dataclasses.replace(MODEL, frames_per_block=5))
    assert_one_line(error, "blocks=1 of 5 frames")


def test_weights_without_anything_to_measure_are_refused(saved, softmax, tmp_path):
    out, own = tmp_path / "a.json", str(saved[0] / "stage2" / "weights")
    closed = dataclasses.replace(HYBRID, memory_gate="zero")
    save_params(tmp_path / "control", saved[1], to_config_dict(closed))
    for weights, layers, message in (
        (softmax, None, "hybrid_layers=0-"),
        (softmax, (0, 7), "hybrid_layers has [7]"),
        (own, (0,), "its own, 1"),
        (str(tmp_path / "control"), None, "memory is closed"),
        (str(tmp_path / "nothing"), None, "nothing"),
    ):
        with pytest.raises(UserError) as error:
            inspect_memory(weights, RANDOM, out, hybrid_layers=layers)
        assert_one_line(error, message)
    with pytest.raises(ConfigError) as error:
        inspect_memory(own, RANDOM, tmp_path / "a.txt")
    assert_one_line(error, "a.txt", ".json")
    assert not out.exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--hybrid_layers=3-1", "--hybrid_layers=3-1 must be"),
        ("--hybrid_layers=0-a", "--hybrid_layers=0-a must be"),
        ("--hybrid_layers=-1", "--hybrid_layers=-1 must be"),
        ("--latent_shape=4", "--latent_shape=4 must be"),
        ("--dtype=int8", "dtype"),
    ],
)
def test_wrong_flags_are_one_line(flag, message):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "inspect_memory.py"), "--weights=x", flag],
        capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and message in done.stderr


def test_layers_are_named_one_by_one_and_in_ranges():
    from command_line import _layers

    assert _layers(["0-2", "7", "5", "2"]) == (0, 1, 2, 5, 7)


def test_the_table_holds_numbers_of_any_size_in_80_columns():
    measures = make_measures(layers=30, heads=40)
    measures["retention"][0] = [0.0] * 40
    lines = retention_table(measures).splitlines()
    assert len(lines) == 32 and max(map(len, lines)) <= 80
    assert lines[2].split()[:4] == ["0", "0", "0", "0"]
    row = measures["tokens"][29]
    shown = [float(x) for x in lines[-1].split()]
    assert len(shown) == 13
    np.testing.assert_allclose(shown[7:10], [np.median(row), min(row), max(row)], atol=0.5)


@pytest.mark.parametrize("value", [1e-45, 9.99e-9, 0.0099999, 0.0999, 0.5, 0.99999, 99.94, 32760])
def test_short_numbers_are_short_and_right(value):
    assert len(short(value)) <= 5
    # Two digits from 0.01 on, one below.
    assert float(short(value)) == pytest.approx(value, rel=0.05 if value >= 0.01 else 0.34)


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), int)


def test_the_picture_shows_every_head():
    """One head after another is changed, and each time other pixels change."""
    measures = make_measures(1, 4)
    measures["retention"] = [[1e-6] * 4]
    base, seen = pixels(retention_picture(measures)), []
    for head in range(4):
        row = [1e-6] * 4
        row[head] = 0.5
        changed = pixels(retention_picture(measures | {"retention": [row]})) != base
        places = np.argwhere(changed.any(axis=2))
        assert len(places) > 1000
        seen.append(places[:, 1].mean())
    assert np.all(np.diff(seen) > 50)


def test_pictures_of_any_size_and_of_zeros_can_be_drawn():
    for layers, heads in ((1, 1), (30, 40)):
        height, width, _ = pixels(retention_picture(make_measures(layers, heads))).shape
        assert 300 < height < 2500 and 600 < width < 2500
    zeros = make_measures(2, 2)
    for name in ("retention", "tokens", "load", "read_to_local"):
        zeros[name] = [[0.0, 0.0]] * 2
    retention_picture(zeros)
    with pytest.raises(ValueError, match="no hybrid layer"):
        retention_picture(make_measures(0, 2) | {"layers": []})


def test_models_of_a_run_are_measured_by_name(saved):
    params = saved[1]
    clips = read_clips(RANDOM, HYBRID)
    fresh = init_params(HYBRID, jax.random.key(0))
    measures, picture = retention_of_models({"untrained": fresh, "stage2": params}, HYBRID, clips)
    assert measures["stage2"] == retention(params, HYBRID, clips) != measures["untrained"]
    assert picture is not None and pixels(picture).std() > 0
    assert retention_of_models({"control": params}, MODEL, clips) == ({}, None)
