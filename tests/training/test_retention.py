"""Retention of a model: at its own activations, with a warning, and stored by a run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from etils import epath

from arl2_jax import models, sharding
from arl2_jax.config import MeshConfig, ModelConfig
from arl2_jax.memory.retention import measure_memory
from arl2_jax.models.wan import make_layer
from arl2_jax.training import retention as module
from arl2_jax.training.retention import (
    forgotten,
    in_ranges,
    record_retention,
    retention,
    warn_if_forgotten,
)

MEASURES = {"retention", "best_kept", "least_kept", "decay", "beta", "load", "tokens", "blocks",
            "read_to_local"}  # fmt: skip
# Two layers of one head of 32 dimensions, on blocks of 512 tokens.
WIDE = ModelConfig(
    dim=64, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=8, text_dim=8, text_len=4, in_dim=4,
    out_dim=4, hybrid_layers=(0, 1), frames_per_block=2, lora_rank=2,
)  # fmt: skip


def make_clips(cfg, *, clips=1, blocks=3, rows=4, columns=6, seed=0):
    rng = np.random.default_rng(seed)
    shape = (clips, blocks * cfg.frames_per_block, rows, columns, cfg.in_dim)
    return {
        "latents": rng.standard_normal(shape, np.float32),
        "text": rng.standard_normal((clips, cfg.text_len, cfg.text_dim), np.float32),
    }


def slow(params):
    """The same parameters, with hardly any decay and weak writes: b_proj reads a constant."""
    layers = {}
    for i, layer in params["blocks"].items():
        delta = layer["delta"] | {"A_log": jnp.full_like(layer["delta"]["A_log"], -12.0)}
        # Strength follows the shift of the first norm, which all tokens share.
        shift = layer["modulation"].at[0].set(1.0)
        delta["b_proj"] = {"kernel": jnp.full_like(delta["b_proj"]["kernel"], -6 / WIDE.dim)}
        layers[i] = layer | {"delta": delta, "modulation": shift}
    return params | {"blocks": layers}


@pytest.fixture(scope="module")
def fresh():
    return retention(
        models.init_params(WIDE, jax.random.key(0)), WIDE, make_clips(WIDE, rows=32, columns=32)
    )


def test_the_published_start_forgets_a_block_and_is_warned_of(fresh, caplog, monkeypatch):
    """Independent keys would leave (1 - 1 / 32)^(512 / 2) = 3e-4 without any decay."""
    monkeypatch.setattr(absl_logging.get_absl_logger(), "propagate", True)
    assert fresh["tokens_per_block"] == 512 and fresh["head_dim"] == 32
    assert np.max(fresh["retention"]) < 1e-2  # these keys have something in common
    np.testing.assert_allclose(fresh["load"], 16, rtol=0.2)
    with caplog.at_level("WARNING"):
        warn_if_forgotten(fresh)
    [record] = caplog.records
    text = record.getMessage()
    for part in ("layers 0-1", "512 tokens", "model.memory_init=by_block",
                 f"{np.max(fresh['retention']):.1e}"):  # fmt: skip
        assert part in text
    assert "\n" not in text


def test_a_slow_state_is_not_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(absl_logging.get_absl_logger(), "propagate", True)
    params = slow(models.init_params(WIDE, jax.random.key(0)))
    found = retention(params, WIDE, make_clips(WIDE, rows=32, columns=32))
    assert np.min(found["retention"]) > 0.1 and np.min(found["blocks"]) > 1.2
    with caplog.at_level("WARNING"):
        warn_if_forgotten(found)
    assert not caplog.records and forgotten(found) is None


@pytest.mark.parametrize("level", [0.0, 0.4])
def test_measures_are_of_the_models_own_activations(cfg, params, apply_clip, level):
    """Every layer on its own, after the clip form has brought the clean copy there."""
    clips = make_clips(cfg, clips=2)
    found = retention(params, cfg, clips, context_noise=level)
    assert json.loads(json.dumps(found)) == found
    assert found["layers"] == [0, 1] and found["blocks_per_clip"] == 3
    assert found.keys() == MEASURES | {"layers", "tokens_per_block", "head_dim", "blocks_per_clip",
                                       "survival"}  # fmt: skip
    assert found["survival"].keys() == {"1", "2"}
    np.testing.assert_allclose(found["survival"]["1"], found["retention"], rtol=1e-6)

    # The published diagnostics of a clip whose two copies are the same.
    latents, text = (jnp.asarray(clips[name]) for name in ("latents", "text"))
    eps = np.random.default_rng(0).standard_normal(latents.shape, np.float32)
    latents = (1 - level) * latents + level * eps
    timestep = jnp.full(latents.shape[:2], 1000 * level)
    _, (logged, _) = apply_clip(params, cfg, latents, latents, timestep, text, timestep)
    for layer in range(2):
        for name, ours in (("block_decay", "decay"), ("beta_mean", "beta"), ("write_load", "load")):
            value = np.mean(found[ours][layer])
            np.testing.assert_allclose(value, logged[name][layer], rtol=1e-5, err_msg=name)


def test_past_blocks_are_read_and_a_softmax_layer_may_lie_between(cfg, make_params):
    """Layers 0 and 2 are hybrid; their measures do not depend on what comes after them."""
    between = dataclasses.replace(cfg, hybrid_layers=(0, 2))
    params, clips = make_params(between), make_clips(between)
    found = retention(params, between, clips)
    assert found["layers"] == [0, 2] and np.min(found["read_to_local"]) > 1e-3
    clip = module._embed(
        {n: x for n, x in params.items() if n != "blocks"}, between, clips["latents"], clips["text"]
    )
    layer = make_layer(between, 0, params["blocks"]["0"])
    h = layer.attention_input(clip.x, clip.conditions)
    p = layer.self_attn.project(h)
    alone = jax.jit(lambda p: measure_memory(layer.memory, p, clip.conditions.grid, 3))(p)
    # A rounding of a matrix moves its least singular value by as much as its largest (Weyl).
    rounding = {"least_kept": 1e-6 * np.max(alone["best_kept"][0])}
    for name in MEASURES:
        np.testing.assert_allclose(
            found[name][0], alone[name][0], rtol=1e-5, atol=rounding.get(name, 0), err_msg=name
        )


def test_a_closed_memory_has_nothing_to_measure(cfg, params):
    closed = dataclasses.replace(cfg, memory_gate="zero")
    for model in (closed, cfg.teacher()):
        found = retention(params, model, make_clips(cfg))
        assert found["layers"] == [] and forgotten(found) is None


def test_the_work_is_sharded(cfg, params):
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2, context=2))
    clips = make_clips(cfg, blocks=2)
    alone = retention(params, cfg, clips)
    placed = sharding.put(params, sharding.tree_shardings(params, mesh))
    shared = retention(placed, cfg, clips)
    for name in MEASURES:
        # Sums in another order, in float32.
        np.testing.assert_allclose(shared[name], alone[name], rtol=1e-4, atol=1e-6, err_msg=name)


class HeldOut:
    """Clips of a run that count how often they are read."""

    def __init__(self, cfg):
        self.cfg, self.asked = cfg, 0

    def held_out(self, count):
        self.asked += 1
        return make_clips(self.cfg, clips=count, blocks=2)


def test_a_run_keeps_its_measures_and_measures_once(config, tmp_path, unchecked):
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, hybrid_layers=(0,))
    )
    params = models.init_params(config.model, jax.random.key(0))
    data, folder = HeldOut(config.model), epath.Path(tmp_path)
    for _ in range(2):
        record_retention(config, params, data, folder, warn=True)
    assert data.asked == 1
    text = (tmp_path / "retention.json").read_text()
    assert text.count("\n") == 1 and np.shape(json.loads(text)["retention"]) == (1, 2)

    noisy = dataclasses.replace(config.sampler, context_noise=0.4)
    noisy = dataclasses.replace(config, sampler=noisy)
    (folder / "noisy").mkdir()
    record_retention(noisy, params, data, folder / "noisy")
    found = json.loads((tmp_path / "noisy" / "retention.json").read_text())
    wanted = retention(params, config.model, data.held_out(1), context_noise=0.4)
    assert found == wanted != json.loads(text)


def test_layers_are_named_in_ranges():
    assert in_ranges([0, 1, 2, 4, 7, 8]) == "0-2,4,7-8"
