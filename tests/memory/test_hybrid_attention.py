"""HybridAttention alone: its scan, its clip form and a loop of steps are one method."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from arl2_jax import HybridAttention, memory
from arl2_jax.config import MEMORY_SETTINGS, MemorySpec
from arl2_jax.errors import ConfigError
from arl2_jax.memory import Room
from arl2_jax.nn.attention import attention
from arl2_jax.nn.positions import sequence_grid, video_grid

DIM, HEADS, HEAD_DIM, BLOCKS, BLOCK = 20, 2, 6, 4, 6
TOKENS = BLOCKS * BLOCK
FRAMES, ROWS, COLUMNS = 8, 1, 3  # of the same tokens as a video

POSITIONS = {
    "none": lambda: None,
    "rope": lambda: sequence_grid(0, TOKENS, HEAD_DIM).rotation(),
    "sequence": lambda: sequence_grid(0, TOKENS, HEAD_DIM),
    "video": lambda: video_grid(0, FRAMES, ROWS, COLUMNS, HEAD_DIM),
}
# Windows count frames: tokens of a sequence, three tokens each of the video.
LONG, SHORT = {"sink": 3, "frames": 12}, {"sink": 1, "frames": 4}
CASES = [
    *(("gated_delta", {}, positions) for positions in POSITIONS),
    *(("softmax_cache", {}, positions) for positions in POSITIONS),
    ("window", LONG, "none"),
    ("window", LONG, "sequence"),
    ("window", SHORT, "video"),
]


@pytest.fixture(scope="module")
def make():
    """The module alone, with noise on all that starts at zero or one."""

    def make(kind="gated_delta", settings=None, **sizes):
        sizes = {"head_dim": HEAD_DIM, "lora_rank": 3} | sizes
        spec = MemorySpec(kind, settings)
        module = HybridAttention(DIM, HEADS, memory=spec, rngs=nnx.Rngs(0), **sizes)
        graph, params = nnx.split(module)
        rng = np.random.default_rng(0)
        noisy = lambda x: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32)
        return nnx.merge(graph, jax.tree.map(noisy, params))

    return make


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (2, TOKENS, DIM))


def room_of(positions):
    if positions is None or isinstance(positions, tuple):
        return Room(TOKENS, 1, BLOCK)
    return Room(positions.frames, positions.tokens_per_frame, positions.frames // BLOCKS)


def block_of(positions, i):
    """Positions of one block."""
    if positions is None or isinstance(positions, tuple):
        return jax.tree.map(lambda r: r[i * BLOCK : (i + 1) * BLOCK], positions)
    return positions.block(i, BLOCKS)


def loop(module, x, positions):
    """`step` over the blocks."""
    state, outputs = module.init_state(len(x), room_of(positions)), []
    for i in range(BLOCKS):
        block = x[:, i * BLOCK : (i + 1) * BLOCK]
        out, state = module.step(block, state, block_of(positions, i))
        outputs.append(out)
    return jnp.concatenate(outputs, axis=1), state


@pytest.mark.parametrize(("kind", "settings", "name"), CASES)
def test_all_forms_agree(make, x, error, kind, settings, name):
    module, positions = make(kind, settings), POSITIONS[name]()
    clip = jax.jit(lambda x: module.clip(x, BLOCK, positions))
    found = clip(x)
    scan = jax.jit(lambda x: module.scan(x, BLOCK, positions))(x)
    # float32 rounding: sums over the past are taken in another order.
    assert error(scan, found) < 2e-6
    # Of rotations alone, only the gated delta memory knows which block it is given.
    if kind == "gated_delta" or name in ("sequence", "video"):
        steps, _ = jax.jit(lambda x: loop(module, x, positions))(x)
        assert error(steps, found) < 2e-6
    # The last block remembers the first one.
    other = clip(x.at[:, :BLOCK].add(1.0))
    assert error(other[:, -BLOCK:], found[:, -BLOCK:]) > 1e-3


@pytest.mark.parametrize(
    ("kind", "settings"), [("gated_delta", {}), ("softmax_cache", {}), ("window", SHORT)]
)
def test_gradients_of_scan_are_those_of_clip(make, x, error, kind, settings):
    graph, params = nnx.split(make(kind, settings))
    weights = jax.random.normal(jax.random.key(2), x.shape)
    positions = POSITIONS["video"]()

    def gradients(form):
        def loss(params, x):
            module = nnx.merge(graph, params)
            return jnp.sum(weights * getattr(module, form)(x, BLOCK, positions))

        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x))

    for scan, clip in zip(gradients("scan"), gradients("clip"), strict=True):
        assert np.any(clip)
        # float32: a gradient is a sum over tokens of terms that cancel in part.
        assert error(scan, clip) < 1e-5


def test_step_attends_and_writes(make, x):
    """`__call__` is its output, `write` its state; what it was given stays."""
    module, positions = make(), POSITIONS["sequence"]()
    state = jax.random.normal(jax.random.key(3), (2, HEADS, HEAD_DIM, HEAD_DIM))
    block, grid = x[:, BLOCK : 2 * BLOCK], block_of(positions, 1)
    out, written = module.step(block, state, grid)
    np.testing.assert_array_equal(module(block, state, grid), out)
    np.testing.assert_array_equal(module.write(block, state, grid), written)
    assert not np.array_equal(written, state)


def test_width_of_a_head(make, x):
    """By default dim / heads; another width changes the projections alone."""
    for head_dim, width in ((None, DIM // HEADS), (8, 8)):
        module = make(head_dim=head_dim)
        assert module.self_attn.q.kernel.shape == (DIM, HEADS * width)
        assert module.init_state(3).shape == (3, HEADS, width, width)
        assert jax.eval_shape(lambda x, m=module: m.clip(x, BLOCK), x).shape == x.shape
    with pytest.raises(ConfigError, match="head_dim=5 must be even and at least 6"):
        make(head_dim=5)


@pytest.mark.parametrize(("kind", "settings"), [("gated_delta", {}), ("window", SHORT)])
def test_state_has_one_size(make, x, kind, settings):
    module, positions = make(kind, settings), POSITIONS["video"]()
    shapes = lambda state: jax.tree.map(lambda s: (s.shape, s.dtype), state)
    rooms = [room_of(positions)._replace(frames=frames) for frames in (None, FRAMES, 10**6)]
    empty = [jax.eval_shape(lambda r=room: module.init_state(2, r)) for room in rooms]
    _, after = jax.eval_shape(lambda x: loop(module, x, positions), x)
    assert shapes(empty[0]) == shapes(empty[1]) == shapes(empty[2]) == shapes(after)


def test_softmax_cache_has_room_for_all(make):
    state = make("softmax_cache").init_state(2, Room(FRAMES, COLUMNS, 2))
    assert state.k.shape == state.v.shape == (2, TOKENS, HEADS, HEAD_DIM)


@pytest.mark.parametrize("form", ["scan", "clip"])
def test_blocks_must_be_whole(make, x, form):
    with pytest.raises(ValueError, match="block_size=5 must divide the 24 tokens of x"):
        getattr(make(), form)(x, 5)


class Inside(nnx.Module):
    """Remembers nothing, and has no form for clips."""

    bounded = True
    stacked = False
    gathers = False

    def __init__(self, settings, cfg, *, rngs):
        pass

    def init_state(self, batch, room):
        return ()

    def attend(self, p, state, grid):
        return attention(p.q, p.k, p.v), None

    def write(self, p, aux, state, grid):
        return state


def test_without_a_clip_form_it_scans(make, x, error):
    memory.register("inside", Inside)
    try:
        module = make("inside")
        scan = module.scan(x, BLOCK)
        assert error(scan, loop(module, x, None)[0]) < 2e-6  # float32, two programs
        with pytest.raises(ValueError, match="Inside has no attend_clip; use scan"):
            module.clip(x, BLOCK)
    finally:
        del memory.MEMORIES["inside"], MEMORY_SETTINGS["inside"]


def test_memories_are_known_by_name(make):
    with pytest.raises(ConfigError, match="kind=windw is no memory; did you mean window"):
        make("windw")


@pytest.mark.parametrize("kind", ["window", "softmax_cache"])
def test_what_keeps_tokens_must_know_where_it_is(kind):
    """Without positions nothing of the past would be seen, and nobody would notice."""
    layer = HybridAttention(20, 2, memory=MemorySpec(kind), rngs=nnx.Rngs(0))
    x, room = jnp.zeros((1, 4, 20)), Room(8, 1, 4)
    state = layer.init_state(1, room)
    for call in (layer, layer.step, layer.write):
        with pytest.raises(ValueError, match="pass a sequence_grid or video_grid"):
            jax.eval_shape(call, x, state)
    late = sequence_grid(4, 4, 10)
    for call in (layer.scan, layer.clip):
        with pytest.raises(ValueError, match="begin at frame 4; must begin at 0"):
            jax.eval_shape(lambda x, call=call: call(x, 2, late), x)


def test_sizes_that_do_not_fit_are_refused():
    layer = HybridAttention(20, 2, rngs=nnx.Rngs(0))
    x = jnp.zeros((1, 12, 20))
    for block_size in (0, -1, 5):
        with pytest.raises(ValueError, match="must divide the 12 tokens"):
            layer.clip(x, block_size)
    with pytest.raises(ValueError, match="positions are of 1 tokens"):
        layer.clip(x, 4, sequence_grid(0, 1, 10))
    with pytest.raises(ValueError, match="6 blocks must divide the 4 frames"):
        layer.clip(x, 2, video_grid(0, 4, 1, 3, 10))
    window = MemorySpec("window", {"sink": 1, "frames": 3})
    short = HybridAttention(20, 2, memory=window, rngs=nnx.Rngs(0))
    for call in (short.scan, short.clip):
        with pytest.raises(ValueError, match="frames=3 of the window must be at least the 4"):
            jax.eval_shape(lambda x, call=call: call(x, 4, sequence_grid(0, 12, 10)), x)
    cache = HybridAttention(20, 2, memory=MemorySpec("softmax_cache"), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="SoftmaxCache must know how many frames to hold"):
        cache.init_state(1)
