"""How a memory starts: as published, or for blocks of the size at hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from one_line import assert_one_line

from arl2_jax.config import Config, DataConfig, GatedDeltaConfig, ModelConfig, PhaseConfig
from arl2_jax.errors import ConfigError
from arl2_jax.memory import GatedDelta, Projections
from arl2_jax.memory.initial import initial_strength
from arl2_jax.memory.retention import survival, transitions
from arl2_jax.models import init_params
from arl2_jax.nn.lora import LowRank
from arl2_jax.nn.positions import given_rotations
from arl2_jax.training.optimizer import make_optimizer, path_name


def make_cfg(tokens, *, heads=4, head_dim=32, **delta):
    return ModelConfig(
        dim=heads * head_dim, ffn_dim=8, num_heads=heads, num_layers=1, lora_rank=2,
        memory_init="by_block", delta=GatedDeltaConfig(block_tokens=tokens, **delta),
    )  # fmt: skip


def random_tokens(cfg, tokens, blocks, seed=0):
    """Projections of unrelated tokens of unit size."""
    rng = np.random.default_rng(seed)
    draw = lambda: jnp.asarray(rng.standard_normal((1, tokens * blocks, cfg.dim)), jnp.float32)
    x, q, k, v = (draw() for _ in range(4))
    heads = lambda y: y.reshape(*y.shape[:2], cfg.num_heads, cfg.head_dim)
    one = jnp.ones(cfg.dim)
    return Projections(x, q, k, heads(q), heads(k), heads(v), one, one)


def not_rotated(cfg, tokens):
    return given_rotations(None, tokens, cfg.head_dim)


def retention(cfg, tokens, blocks=2):
    """Share of a random state that survives a block, of each head [H]."""
    memory = GatedDelta(cfg.delta, cfg.attention, rngs=nnx.Rngs(0))
    writes = memory.writes(
        random_tokens(cfg, tokens, blocks), not_rotated(cfg, tokens * blocks), blocks
    )
    kept = jax.jit(lambda writes: survival(transitions(writes, blocks, cfg.delta), 1))
    return kept(writes)[0]


def test_the_published_start_is_unchanged_bit_for_bit(cfg):
    """Drawn by the calls that the published start has always made, in their order."""
    rngs, heads = nnx.Rngs(0), cfg.num_heads
    small = nnx.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")
    kernels = [
        nnx.Linear(cfg.dim, heads, use_bias=False, kernel_init=small, rngs=rngs).kernel[...]
        for _ in range(3)
    ]
    rates = jax.random.uniform(rngs.params(), (heads,), minval=1e-4, maxval=16.0)
    steps = jnp.exp(
        jax.random.uniform(rngs.params(), (heads,), minval=jnp.log(1e-3), maxval=jnp.log(1e-1))
    )
    kaiming = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    loras = [kaiming(rngs.params(), (cfg.dim, cfg.lora_rank)) for _ in range(3)]
    memory = GatedDelta(cfg.delta, cfg.attention, rngs=nnx.Rngs(0))
    found = nnx.to_pure_dict(nnx.split(memory)[1])
    for name, kernel in zip(("a_proj", "b_proj", "gate_proj"), kernels, strict=True):
        np.testing.assert_array_equal(found[name]["kernel"], kernel)
        assert set(found[name]) == {"kernel"}
    np.testing.assert_array_equal(found["A_log"], jnp.log(rates))
    np.testing.assert_array_equal(found["dt_bias"], steps + jnp.log(-jnp.expm1(-steps)))
    for name, a in zip("qkv", loras, strict=True):
        np.testing.assert_array_equal(found[f"lora_{name}"]["a"], a)
        np.testing.assert_array_equal(
            found[f"phi_{name}"], np.tile(np.eye(cfg.head_dim), (heads, 1, 1))
        )
    assert "beta_bias" not in found


@pytest.mark.slow
def test_retention_by_block_does_not_depend_on_the_size_of_the_block():
    """The same share of a state, head by head, within a tenth: what tokens draw varies with n."""
    found = {n: retention(make_cfg(n), n) for n in (32, 512, 4680)}
    for n in (32, 512):
        np.testing.assert_allclose(found[n], found[4680], rtol=0.1)
    assert 0.3 < float(jnp.min(found[4680])) < float(jnp.max(found[4680])) < 0.9


def test_the_published_start_forgets_a_block_of_many_tokens():
    cfg = dataclasses.replace(make_cfg(0), memory_init="published")
    assert float(jnp.max(retention(cfg, 1024))) < 1e-4
    assert float(jnp.max(retention(cfg, 32))) > 1e-2


@pytest.mark.parametrize(
    ("tokens", "load"), [(512, 0.5), (64, 0.3), pytest.param(2048, 1.0, marks=pytest.mark.slow)]
)
def test_writes_leave_what_their_load_says(tokens, load):
    """Without decay."""
    cfg = make_cfg(tokens, write_load=load, decay="none")
    # What random keys leave varies by a few per cent from draw to draw.
    np.testing.assert_allclose(retention(cfg, tokens), np.exp(-load), rtol=0.06)
    beta = initial_strength(tokens, cfg.head_dim, load)
    np.testing.assert_allclose((1 - beta * (2 - beta) / 32) ** (tokens / 2), np.exp(-load))


def test_the_strongest_start_erases_what_a_key_has_held():
    assert initial_strength(4, 128, 5.0) == 1
    cfg = make_cfg(4, head_dim=128, write_load=5.0)
    memory = GatedDelta(cfg.delta, cfg.attention, rngs=nnx.Rngs(0))
    strength = 2 * jax.nn.sigmoid(memory.beta_bias[...])
    assert bool(jnp.all(jnp.isfinite(memory.beta_bias[...])) and jnp.all(strength == strength[0]))
    np.testing.assert_allclose(strength, 1, rtol=1e-6)


def test_time_constants_spread_over_the_heads():
    """One in each of as many equal parts of the range, in the logarithm."""
    cfg = make_cfg(100, heads=8, time_constants=(0.5, 128.0))
    memory = GatedDelta(cfg.delta, cfg.attention, rngs=nnx.Rngs(3))
    steps = jax.nn.softplus(memory.dt_bias[...]) * jnp.exp(memory.A_log[...])
    blocks = np.sort(1 / (np.asarray(steps) * 100))
    parts = np.log2(blocks / 0.5)
    np.testing.assert_array_equal(np.floor(parts + 1e-3), np.arange(8))


def test_the_read_begins_as_large_as_its_gain_says():
    cfg = make_cfg(64, read_gain=0.5)
    memory = GatedDelta(cfg.delta, cfg.attention, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(memory.phi_v[...], np.tile(0.5 * 32**0.5 * np.eye(32), (4, 1, 1)))


def test_blocks_of_unknown_size_are_one_line():
    cfg = dataclasses.replace(make_cfg(0), hybrid_layers=(0,), text_len=4, text_dim=8)
    with pytest.raises(ConfigError, match=r"model\.delta\.block_tokens") as error:
        init_params(cfg, jax.random.key(0))
    assert_one_line(error)


def test_a_run_tells_its_model_the_size_of_a_block():
    model = ModelConfig.tiny(memory_init="by_block")
    config = Config(model, data=DataConfig(frames=8, height=8, width=32))
    assert config.model.delta.block_tokens == 2 * 2 * 8
    assert Config(ModelConfig.tiny()).model == ModelConfig.tiny()


def test_low_rank_updates_begin_as_published():
    for init, bound in (("fan_in", 64**-0.5), ("published", 4**-0.5)):
        make = LowRank(64, 8, 4, 8.0, jnp.float32, init=init, rngs=nnx.Rngs(0))
        largest = float(jnp.max(jnp.abs(make.a[...])))
        assert 0.9 * bound < largest <= bound
        assert not np.any(make.b[...])


def test_decay_pulls_projections_to_where_they_start():
    cfg = dataclasses.replace(make_cfg(64), hybrid_layers=(0,), text_len=4, text_dim=8)
    params = jax.jit(init_params, static_argnums=0)(cfg, jax.random.key(0))
    phase = PhaseConfig(learning_rate=1.0, warmup=0, weight_decay=0.5, steps=10)
    optimizer = make_optimizer(phase, params, value_scale=0.3 * 32**0.5)
    zero = jax.tree.map(jnp.zeros_like, params)
    update = jax.jit(optimizer.update)
    updates, _ = update(zero, optimizer.init(params), params)
    for path, change in jax.tree_util.tree_leaves_with_path(updates):
        if "phi_" in path_name(path):
            np.testing.assert_array_equal(change, 0, path_name(path))
    moved = jax.tree.map(lambda x: x + 1, params)
    updates, _ = update(zero, optimizer.init(moved), moved)
    np.testing.assert_allclose(updates["blocks"]["0"]["delta"]["phi_v"], -0.5, rtol=1e-5)
