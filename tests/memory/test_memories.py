"""Every memory keeps the promises of the interface."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arl2_jax.config import GatedDeltaConfig
from arl2_jax.memory import MEMORIES, Projections
from arl2_jax.nn.norm import rms_norm
from arl2_jax.nn.rope import video_rope


def make_projections(cfg, frames, rows, columns, *, batch=2, seed=0):
    """Random tokens of a layer, projected by nothing: each projection is drawn on its own."""
    rng = np.random.default_rng(seed)
    tokens = frames * rows * columns
    x, q_raw, k_raw, v = rng.standard_normal((4, batch, tokens, cfg.dim), np.float32)
    q_scale, k_scale = 1 + 0.2 * rng.standard_normal((2, cfg.dim), np.float32)
    heads = lambda y: jnp.reshape(y, (batch, tokens, cfg.num_heads, cfg.head_dim))
    q, k = rms_norm(q_raw, q_scale, cfg.eps), rms_norm(k_raw, k_scale, cfg.eps)
    rope = video_rope(0, frames, rows, columns, cfg.head_dim)
    return Projections(*map(jnp.asarray, (x, q_raw, k_raw)), heads(q), heads(k), heads(v),
                       jnp.asarray(q_scale), jnp.asarray(k_scale), rope)  # fmt: skip


def make_memory(cfg, make_params, kind):
    """A memory of this kind with random parameters."""
    if kind != "gated_delta":
        return MEMORIES[kind](cfg, rngs=nnx.Rngs(0))
    delta = make_params(dataclasses.replace(cfg, hybrid_layers=(0,)))["blocks"]["0"]["delta"]
    own = {name: node for name, node in delta.items() if not name.startswith("lora_fc")}
    graph, _ = nnx.split(nnx.eval_shape(lambda: MEMORIES[kind](cfg, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, own)


def part(p: Projections, clips: slice, tokens: slice) -> Projections:
    """Some of the tokens of some of the batch."""
    names = ("x", "q_raw", "k_raw", "q", "k", "v")
    cut = {name: getattr(p, name)[clips, tokens] for name in names}
    return p._replace(**cut, rope=jax.tree.map(lambda r: r[tokens], p.rope))


def block_form(memory, p, blocks, copies):
    """`attend` and `write` block by block, from the definition of the interface."""
    batch, total = p.x.shape[:2]
    n = total // blocks
    state, outputs = memory.init_state(batch // copies, total), []
    for i in range(blocks):
        own = slice(i * n, (i + 1) * n)
        each = [part(p, slice(copy, None, copies), own) for copy in range(copies)]
        attended = [memory.attend(copy, state, i * n) for copy in each]
        outputs.append(jnp.stack(attended, axis=1).reshape(batch, n, *p.v.shape[2:]))
        state = memory.write(each[0], state, i * n)
    return jnp.concatenate(outputs, axis=1)


SHAPES = {  # head dimension, heads, frames per block, blocks, rows, columns
    "one_frame": (16, 2, 1, 4, 2, 3),
    "odd_grid": (6, 3, 2, 3, 3, 5),
    "one_block": (10, 2, 3, 1, 1, 3),
    "one_token": (32, 1, 1, 5, 1, 1),
    "long_block": (8, 2, 3, 2, 5, 7),  # 105 tokens: more than a kernel's chunk, and odd
}


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", MEMORIES)
def test_clip_form_is_block_form(cfg, make_params, error, kind, shape, copies):
    width, heads, f, blocks, rows, columns = SHAPES[shape]
    cfg = dataclasses.replace(cfg, dim=width * heads, num_heads=heads, frames_per_block=f)
    memory = make_memory(cfg, make_params, kind)
    p = make_projections(cfg, blocks * f, rows, columns, batch=2 * copies)
    graph, params = nnx.split(memory)

    @jax.jit
    def both(params, p):
        memory = nnx.merge(graph, params)
        return memory.attend_clip(p, blocks, copies)[0], block_form(memory, p, blocks, copies)

    clip, loop = both(params, p)
    # float32 rounding: the clip form composes states of blocks, the loop applies them in turn.
    assert error(clip, loop) < 2e-6


@pytest.fixture(scope="module")
def block(cfg):
    return make_projections(cfg, cfg.frames_per_block, 2, 3)


@pytest.fixture(scope="module")
def delta(cfg, make_params):
    return make_memory(cfg, make_params, "gated_delta")


@pytest.fixture(scope="module")
def state():
    return jax.random.normal(jax.random.key(0), (2, 2, 16, 16))


def test_tokens_of_a_block_read_the_same_state(delta, block, state):
    """The derivative along a state is what is read of it: no key or value of the block enters."""
    other = block._replace(k_raw=2 - block.k_raw, k=2 - block.k, v=3 - block.v)
    direction = state[::-1]
    read = jax.jit(lambda p: jax.jvp(lambda s: delta.attend(p, s), (state,), (direction,))[1])
    np.testing.assert_array_equal(read(other), read(block))
    assert np.abs(read(block)).mean() > 0.01


def test_reading_is_token_by_token(delta, block, state):
    """Changing one token changes what that token alone reads."""
    read = jax.jit(lambda p: jax.jvp(lambda s: delta.attend(p, s), (state,), (state,))[1])
    other = block._replace(x=block.x.at[:, 4].add(1.0), q_raw=block.q_raw.at[:, 4].add(1.0))
    changed = np.any(read(other) != read(block), axis=(0, 2, 3))
    assert list(np.flatnonzero(changed)) == [4]


def test_written_state_depends_on_keys_and_values_alone(delta, block, state):
    write = jax.jit(delta.write)
    wanted = write(block, state)
    other = block._replace(q_raw=-block.q_raw, q=-block.q, q_scale=-block.q_scale)
    np.testing.assert_array_equal(write(other, state), wanted)
    for name in ("x", "k_raw", "v"):
        changed = block._replace(**{name: getattr(block, name) + 1})
        assert np.abs(write(changed, state) - wanted).max() > 1e-3, name


def test_softmax_cache_ignores_slots_that_are_not_written(cfg, make_params, block):
    memory = make_memory(cfg, make_params, "softmax_cache")
    attend = jax.jit(memory.attend)
    empty = memory.init_state(2, 36)
    written = memory.write(block, empty, 0)
    poison = jax.tree.map(lambda x: x.at[:, 12:].set(jnp.nan), written)
    np.testing.assert_array_equal(
        attend(block, poison, jnp.int32(12)), attend(block, written, jnp.int32(12))
    )


@pytest.mark.parametrize("copies", [1, 2])
def test_closed_gate_is_softmax_inside_the_block(cfg, make_params, error, copies):
    closed = dataclasses.replace(cfg, memory_gate="zero")
    memory = make_memory(closed, make_params, "gated_delta")
    p = make_projections(cfg, 6, 2, 3)
    out, diagnostics = jax.jit(lambda p: memory.attend_clip(p, 3, copies))(p)
    n, scale = 12, cfg.head_dim**-0.5
    for start in range(0, 36, n):
        rope = slice(start, start + n)
        q, k = (rotated(np.asarray(x[:, start : start + n]), p.rope, rope) for x in (p.q, p.k))
        scores = np.exp(scale * np.einsum("bqhd,bkhd->bhqk", q, k))
        weights = scores / scores.sum(-1, keepdims=True)
        wanted = np.einsum("bhqk,bkhd->bqhd", weights, p.v[:, start : start + n])
        assert error(out[:, start : start + n], wanted) < 1e-6  # float32 against float64
    assert diagnostics == {}
    one = part(p, slice(None), slice(0, n))
    np.testing.assert_array_equal(memory.write(one, jnp.ones((2, 2, 16, 16))), 1)


def rotated(x, rope, tokens):
    """Interleaved pairs as complex numbers, float64."""
    turn = (np.asarray(rope.cos, np.float64) + 1j * np.asarray(rope.sin, np.float64))[tokens]
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * turn[:, None]
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize(("frames", "rows", "columns"), [(1, 1, 1), (2, 2, 3), (3, 5, 7)])
def test_leak_is_the_same_share_of_every_block(cfg, make_params, error, frames, rows, columns):
    """The difference of two states that a block finds shrinks to (1 - leak) of what it would be."""
    left = {}
    for leak in (0.0, 0.3):
        # Weak writes without decay, so that something of the state is left after 105 tokens.
        settings = GatedDeltaConfig(decay="none", beta_max=0.1, leak=leak)
        varied = dataclasses.replace(cfg, delta=settings)
        memory = make_memory(varied, make_params, "gated_delta")
        p = make_projections(varied, frames, rows, columns, batch=1)
        some, none = jnp.ones((1, 2, 16, 16)), jnp.zeros((1, 2, 16, 16))
        left[leak] = memory.write(p, some) - memory.write(p, none)
    assert np.abs(left[0.0]).max() > 0.1
    assert error(left[0.3], 0.7 * left[0.0]) < 1e-5  # float32, a difference of two states


def test_diagnostics_are_what_their_names_say(delta, cfg):
    p = make_projections(cfg, 6, 2, 3)
    out, found = jax.jit(lambda p: delta.attend_clip(p, 3, 2))(p)
    gate = jax.nn.sigmoid(delta.gate_proj(p.x))
    np.testing.assert_allclose(found["gate_mean"], jnp.mean(gate), rtol=1e-5)
    np.testing.assert_allclose(found["gate_below_0.05"], np.mean(gate < 0.05), rtol=1e-5)
    np.testing.assert_allclose(found["gate_above_0.95"], np.mean(gate > 0.95), rtol=1e-5)
    # Both copies are in the batch; the clean ones alone write.
    writes = delta.writes(p.first_of(2), 3)
    decay = np.exp(np.asarray(writes.g).reshape(1, 3, 12, cfg.num_heads).sum(axis=2))
    np.testing.assert_allclose(found["block_decay"], decay.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["beta_mean"], np.mean(writes.beta), rtol=1e-5)
    load = 12 * np.mean(writes.beta) / cfg.head_dim
    np.testing.assert_allclose(found["write_load"], load, rtol=1e-5)
    # Where the state is open for all, the first block reads nothing.
    assert 0 < found["memory_rms"] < 1
    rms = np.sqrt(np.mean(np.square(out)))
    bound = found["local_rms"] * (1 + found["gated_memory_to_local"])
    assert found["local_rms"] * (1 - found["gated_memory_to_local"]) <= rms <= bound


def test_state_is_float32_and_of_fixed_size(cfg):
    half = dataclasses.replace(cfg, dtype="bfloat16")
    memory = MEMORIES["gated_delta"](half, rngs=nnx.Rngs(0))
    for capacity in (0, 10**9):
        state = jax.eval_shape(lambda c=capacity: memory.init_state(3, c))
        assert (state.shape, state.dtype) == ((3, 2, 16, 16), jnp.float32)
