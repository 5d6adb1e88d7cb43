"""Every memory keeps the promises of the interface."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arl2_jax import memory as memory_module
from arl2_jax.config import GatedDeltaConfig, MemorySpec
from arl2_jax.memory import MEMORIES, Projections, Room
from arl2_jax.nn.norm import rms_norm
from arl2_jax.nn.positions import video_grid


def make_projections(cfg, frames, rows, columns, *, batch=2, seed=0):
    """Random tokens of a layer, projected by nothing: each projection is drawn on its own."""
    rng = np.random.default_rng(seed)
    tokens = frames * rows * columns
    x, q_raw, k_raw, v = rng.standard_normal((4, batch, tokens, cfg.dim), np.float32)
    q_scale, k_scale = 1 + 0.2 * rng.standard_normal((2, cfg.dim), np.float32)
    heads = lambda y: jnp.asarray(y).reshape(batch, tokens, cfg.num_heads, cfg.head_dim)
    q, k = rms_norm(q_raw, q_scale, cfg.eps), rms_norm(k_raw, k_scale, cfg.eps)
    return Projections(*map(jnp.asarray, (x, q_raw, k_raw)), heads(q), heads(k), heads(v),
                       jnp.asarray(q_scale), jnp.asarray(k_scale))  # fmt: skip


def make_memory(cfg, make_params, spec):
    """A memory with random parameters."""
    spec = MemorySpec(spec, cfg.delta if spec == "gated_delta" else None)
    if not spec.settings.converts:
        return memory_module.make_memory(spec, cfg.attention, rngs=nnx.Rngs(0))
    delta = make_params(dataclasses.replace(cfg, hybrid_layers=(0,)))["blocks"]["0"]["delta"]
    own = {name: node for name, node in delta.items() if not name.startswith("lora_fc")}
    make = lambda: memory_module.make_memory(spec, cfg.attention, rngs=nnx.Rngs(0))
    return nnx.merge(nnx.split(nnx.eval_shape(make))[0], own)


def part(p: Projections, clips: slice, tokens: slice) -> Projections:
    """Some of the tokens of some of the batch."""
    names = ("x", "q_raw", "k_raw", "q", "k", "v")
    return p._replace(**{name: getattr(p, name)[clips, tokens] for name in names})


def block_form(memory, p, grid, blocks, copies):
    """`attend` and `write` block by block, from the definition of the interface."""
    batch, total = p.x.shape[:2]
    n = total // blocks
    room = Room(grid.frames, grid.tokens_per_frame, grid.frames // blocks)
    state, outputs = memory.init_state(batch // copies, room), []
    for i in range(blocks):
        own = slice(i * n, (i + 1) * n)
        each = [part(p, slice(copy, None, copies), own) for copy in range(copies)]
        attended = [memory.attend(copy, state, grid.block(i, blocks)) for copy in each]
        attended, auxes = zip(*attended, strict=True)
        outputs.append(jnp.stack(attended, axis=1).reshape(batch, n, *p.v.shape[2:]))
        state = memory.write(each[0], auxes[0], state, grid.block(i, blocks))
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
    grid = video_grid(0, blocks * f, rows, columns, cfg.head_dim)
    graph, params = nnx.split(memory)

    @jax.jit
    def both(params, p):
        memory = nnx.merge(graph, params)
        loop = block_form(memory, p, grid, blocks, copies)
        return memory.attend_clip(p, grid, blocks, copies)[0], loop

    clip, loop = both(params, p)
    # float32 rounding: the clip form composes states of blocks, the loop applies them in turn.
    assert error(clip, loop) < 2e-6


@pytest.fixture(scope="module")
def grid(cfg):
    return video_grid(0, cfg.frames_per_block, 2, 3, cfg.head_dim)


@pytest.fixture(scope="module")
def block(cfg):
    return make_projections(cfg, cfg.frames_per_block, 2, 3)


@pytest.fixture(scope="module")
def delta(cfg, make_params):
    return make_memory(cfg, make_params, "gated_delta")


@pytest.fixture(scope="module")
def state():
    return jax.random.normal(jax.random.key(0), (2, 2, 16, 16))


def test_tokens_of_a_block_read_the_same_state(delta, block, grid, state):
    """The derivative along a state is what is read of it: no key or value of the block enters."""
    other = block._replace(k_raw=2 - block.k_raw, k=2 - block.k, v=3 - block.v)
    direction = state[::-1]
    attend = lambda p, s: delta.attend(p, s, grid)[0]
    read = jax.jit(lambda p: jax.jvp(lambda s: attend(p, s), (state,), (direction,))[1])
    np.testing.assert_array_equal(read(other), read(block))
    assert np.abs(read(block)).mean() > 0.01


def test_reading_is_token_by_token(delta, block, grid, state):
    """Changing one token changes what that token alone reads."""
    attend = lambda p, s: delta.attend(p, s, grid)[0]
    read = jax.jit(lambda p: jax.jvp(lambda s: attend(p, s), (state,), (state,))[1])
    other = block._replace(x=block.x.at[:, 4].add(1.0), q_raw=block.q_raw.at[:, 4].add(1.0))
    changed = np.any(read(other) != read(block), axis=(0, 2, 3))
    assert list(np.flatnonzero(changed)) == [4]


def test_written_state_depends_on_keys_and_values_alone(delta, block, grid, state):
    write = jax.jit(lambda p, s: delta.write(p, None, s, grid))
    wanted = write(block, state)
    other = block._replace(q_raw=-block.q_raw, q=-block.q, q_scale=-block.q_scale)
    np.testing.assert_array_equal(write(other, state), wanted)
    for name in ("x", "k_raw", "v"):
        changed = block._replace(**{name: getattr(block, name) + 1})
        assert np.abs(write(changed, state) - wanted).max() > 1e-3, name


def test_softmax_cache_ignores_slots_that_are_not_written(cfg, make_params, block, grid):
    memory = make_memory(cfg, make_params, "softmax_cache")
    attend = jax.jit(lambda state: memory.attend(block, state, grid_at(grid, 2))[0])
    written = memory.write(block, None, memory.init_state(2, Room(6, 6, 2)), grid)
    poison = jax.tree.map(lambda x: x.at[:, 12:].set(jnp.nan), written)
    np.testing.assert_array_equal(attend(poison), attend(written))


def grid_at(grid, first_frame):
    """The same grid later in the video."""
    return video_grid(jnp.int32(first_frame), grid.frames, grid.rows, grid.columns, grid.head_dim)


@pytest.mark.parametrize("copies", [1, 2])
def test_closed_gate_is_softmax_inside_the_block(cfg, make_params, error, copies):
    memory_off = dataclasses.replace(cfg, memory_gate="zero")
    memory = make_memory(memory_off, make_params, "gated_delta")
    p, grid = make_projections(cfg, 6, 2, 3), video_grid(0, 6, 2, 3, cfg.head_dim)
    out, diagnostics = jax.jit(lambda p: memory.attend_clip(p, grid, 3, copies))(p)
    n, scale = 12, cfg.head_dim**-0.5
    for start in range(0, 36, n):
        rope = slice(start, start + n)
        q, k = (
            rotated(np.asarray(x[:, start : start + n]), grid.rotation(), rope) for x in (p.q, p.k)
        )
        scores = np.exp(scale * np.einsum("bqhd,bkhd->bhqk", q, k))
        weights = scores / scores.sum(-1, keepdims=True)
        wanted = np.einsum("bhqk,bkhd->bqhd", weights, p.v[:, start : start + n])
        assert error(out[:, start : start + n], wanted) < 1e-6  # float32 against float64
    assert diagnostics == {}
    one = part(p, slice(None), slice(0, n))
    kept = memory.write(one, None, jnp.ones((2, 2, 16, 16)), grid.block(0, 3))
    np.testing.assert_array_equal(kept, 1)


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
        grid = video_grid(0, frames, rows, columns, cfg.head_dim)
        some, none = jnp.ones((1, 2, 16, 16)), jnp.zeros((1, 2, 16, 16))
        left[leak] = memory.write(p, None, some, grid) - memory.write(p, None, none, grid)
    assert np.abs(left[0.0]).max() > 0.1
    assert error(left[0.3], 0.7 * left[0.0]) < 1e-5  # float32, a difference of two states


def test_diagnostics_are_what_their_names_say(delta, cfg):
    p, grid = make_projections(cfg, 6, 2, 3), video_grid(0, 6, 2, 3, cfg.head_dim)
    attend = lambda p: (*delta.attend_clip(p, grid, 3, 2), delta.read_clip(p, grid, 3, 2))
    out, found, (read, _) = jax.jit(attend)(p)
    gate = jax.nn.sigmoid(delta.gate_proj(p.x))
    np.testing.assert_allclose(found["gate_mean"], jnp.mean(gate), rtol=1e-5)
    np.testing.assert_allclose(found["gate_below_0.05"], np.mean(gate < 0.05), rtol=1e-5)
    np.testing.assert_allclose(found["gate_above_0.95"], np.mean(gate > 0.95), rtol=1e-5)
    # Both copies are in the batch; the clean ones alone write.
    writes = delta.writes(p.first_of(2), grid, 3)
    decay = np.exp(np.asarray(writes.g).reshape(1, 3, 12, cfg.num_heads).sum(axis=2))
    np.testing.assert_allclose(found["block_decay"], decay.mean(), rtol=1e-5)
    np.testing.assert_allclose(found["beta_mean"], np.mean(writes.beta), rtol=1e-5)
    load = 12 * np.mean(writes.beta) / cfg.head_dim
    np.testing.assert_allclose(found["write_load"], load, rtol=1e-5)
    rms = lambda x: np.sqrt(np.mean(np.square(np.asarray(x, np.float64))))
    gated = np.asarray(gate)[..., None] * read
    np.testing.assert_allclose(found["memory_rms"], rms(read), rtol=1e-5)
    np.testing.assert_allclose(found["local_rms"], rms(out - gated), rtol=1e-4)
    ratio = rms(gated) / rms(out - gated)
    np.testing.assert_allclose(found["gated_memory_to_local"], ratio, rtol=1e-4)


def test_state_is_float32_and_of_fixed_size(cfg):
    half = dataclasses.replace(cfg, dtype="bfloat16")
    memory = MEMORIES["gated_delta"](half.delta, half.attention, rngs=nnx.Rngs(0))
    for frames in (None, 0, 10**9):
        state = jax.eval_shape(lambda n=frames: memory.init_state(3, Room(n, 6, 2)))
        assert (state.shape, state.dtype) == ((3, 2, 16, 16), jnp.float32)
