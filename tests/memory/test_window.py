"""The window memory against its definition: the visible frames as a video of their own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from memory.test_memories import block_form, make_projections

from arl2_jax import models
from arl2_jax.config import MemorySpec, ModelConfig, WindowConfig
from arl2_jax.errors import ConfigError
from arl2_jax.memory import Room, Window
from arl2_jax.nn.positions import video_grid

HEADS, WIDTH, ROWS, COLUMNS = 2, 10, 2, 3
N = ROWS * COLUMNS

CASES = {  # frames per block, blocks, sink, window
    "sink and window in whole blocks": (2, 6, 2, 4),
    "sink within a block": (3, 5, 1, 6),
    "window not in whole blocks": (3, 6, 3, 7),
    "sink over two blocks": (2, 7, 3, 5),
    "window shorter than two blocks": (3, 5, 2, 4),
    "no sink": (2, 6, 0, 5),
    "nothing but sink and block": (2, 6, 2, 2),
    "block alone": (2, 4, 0, 2),
    "single frames": (1, 8, 1, 3),
    "nothing dropped": (2, 4, 3, 9),
}


def make_window(sink, frames, width=WIDTH):
    cfg = ModelConfig(dim=HEADS * width, ffn_dim=8, num_heads=HEADS, num_layers=1)
    return cfg, Window(WindowConfig(sink, frames), cfg.attention, rngs=nnx.Rngs(0))


def rotated(x, positions):
    """Rotates tokens [n, H, D] of frames at whole positions, float64."""
    spatial = 2 * (WIDTH // 6)
    place = np.stack(
        np.meshgrid(positions, np.arange(ROWS), np.arange(COLUMNS), indexing="ij"), axis=-1
    ).reshape(-1, 3)
    angles = np.concatenate(
        [
            np.outer(place[:, axis], 10000.0 ** (-np.arange(0, size, 2) / size))
            for axis, size in enumerate((WIDTH - 2 * spatial, spatial, spatial))
        ],
        axis=1,
    )
    pairs = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def by_definition(p, f, sink, window):
    """Outputs of all blocks: the frames that are visible stand one behind the other."""
    q, k, v = (np.asarray(x[0], np.float64) for x in (p.q, p.k, p.v))
    outputs = []
    for first in range(0, len(q) // N, f):
        last = range(max(first - (window - f), 0), first + f)
        seen = sorted({*range(min(sink, first)), *last})
        take = lambda x, frames: np.concatenate([x[t * N : (t + 1) * N] for t in frames])
        keys = rotated(take(k, seen), np.arange(len(seen)))
        queries = rotated(take(q, range(first, first + f)), np.arange(len(seen) - f, len(seen)))
        scores = np.exp(np.einsum("nhd,mhd->hnm", queries, keys) / np.sqrt(WIDTH))
        weights = scores / scores.sum(-1, keepdims=True)
        outputs.append(np.einsum("hnm,mhd->nhd", weights, take(v, seen)))
    return np.concatenate(outputs)[None]


@pytest.mark.parametrize("case", CASES)
def test_both_forms_are_the_definition(case, error):
    f, blocks, sink, window = CASES[case]
    cfg, memory = make_window(sink, window)
    p = make_projections(cfg, f * blocks, ROWS, COLUMNS, batch=1)
    grid = video_grid(0, f * blocks, ROWS, COLUMNS, WIDTH)
    wanted = by_definition(p, f, sink, window)
    loop = jax.jit(lambda p: block_form(memory, p, grid, blocks, 1))(p)
    clip = jax.jit(lambda p: memory.attend_clip(p, grid, blocks, 1)[0])(p)
    # float32 against float64: scores of unit size, and sums over at most 60 keys.
    assert error(loop, wanted) < 2e-6
    assert error(clip, wanted) < 2e-6


@pytest.mark.parametrize("case", ["sink within a block", "window not in whole blocks"])
def test_noisy_copies_see_clean_pasts_and_gradients_agree(case, error):
    f, blocks, sink, window = CASES[case]
    cfg, memory = make_window(sink, window)
    p = make_projections(cfg, f * blocks, ROWS, COLUMNS, batch=4)
    grid = video_grid(0, f * blocks, ROWS, COLUMNS, WIDTH)
    direction = jax.random.normal(jax.random.key(0), p.v.shape)

    @jax.jit
    def gradients(p):
        loop = lambda p: jnp.vdot(direction, block_form(memory, p, grid, blocks, 2))
        clip = lambda p: jnp.vdot(direction, memory.attend_clip(p, grid, blocks, 2)[0])
        return jax.value_and_grad(loop)(p), jax.value_and_grad(clip)(p)

    (value, by_loop), (wanted_value, by_clip) = gradients(p)
    np.testing.assert_allclose(value, wanted_value, rtol=1e-4)
    for name in ("q", "k", "v"):
        assert error(getattr(by_loop, name), getattr(by_clip, name)) < 5e-6  # float32 sums


def test_positions_matter_by_their_differences_alone(error):
    """A video that has run for long attends like one that has just filled its window."""
    f, sink, window = 2, 3, 5
    cfg, memory = make_window(sink, window)
    p = make_projections(cfg, 2 * f, ROWS, COLUMNS, batch=1)
    halves = {name: jnp.split(x, 2, axis=1) for name, x in p._asdict().items() if x.ndim > 1}
    first, second = (p._replace(**{name: x[i] for name, x in halves.items()}) for i in (0, 1))

    @jax.jit
    def attend(t):
        """At frame t + 8, after blocks that all repeat two; t in multiples of the ring."""
        state = memory.init_state(1, Room(None, N, f))
        for i in range(2):  # fills the sink
            state = memory.write(first, None, state, video_grid(i * f, f, ROWS, COLUMNS, WIDTH))
        for i in range(2, 4):
            state = memory.write(
                second, None, state, video_grid(t + i * f, f, ROWS, COLUMNS, WIDTH)
            )
        return memory.attend(first, state, video_grid(t + 4 * f, f, ROWS, COLUMNS, WIDTH))[0]

    soon = attend(jnp.int32(0))
    for t in (300, 3 * 10**8):
        assert error(attend(jnp.int32(t)), soon) < 2e-6  # rotations are exact at any position


def test_state_has_one_size_and_needs_no_end():
    _, memory = make_window(3, 9)
    shapes = {
        jax.eval_shape(lambda n=n: memory.init_state(2, Room(n, N, 3))).k.shape
        for n in (None, 3, 900)
    }
    assert shapes == {(2, 6 * N, HEADS, WIDTH)}


def test_window_is_full_softmax_while_nothing_is_dropped(
    cfg, make_params, make_clip, block_by_block, error
):
    full = dataclasses.replace(cfg, hybrid_layers=(1,), memories=())
    window = dataclasses.replace(
        full, memories=(MemorySpec("window", WindowConfig(sink=3, frames=9), (0, 2)),)
    )
    params = make_params(full)
    # Six blocks of two frames: 12 = sink + window.
    clip = make_clip(full, blocks=6, batch=1)
    wanted, _ = block_by_block(params, full, clip)
    found, memory = block_by_block(params, window, clip)
    assert error(found, wanted) < 1e-5  # float32 sums in another order, through three layers
    longer = make_clip(full, blocks=8, batch=1)
    assert (
        error(block_by_block(params, window, longer)[0], block_by_block(params, full, longer)[0])
        > 1e-4
    )
    assert memory[0].k.shape == (1, 1, 7 * 6, 2, 16)


def test_trained_form_is_the_generated_form(
    cfg, make_params, make_clip, apply_clip, block_by_block, error
):
    """A network that mixes windows, a full cache and gated delta states, with frames dropped."""
    mixed = dataclasses.replace(
        cfg, num_layers=4, hybrid_layers=(1,),
        memories=(MemorySpec("window", WindowConfig(sink=1, frames=3), (0, 3)),),
    )  # fmt: skip
    params, clip = make_params(mixed), make_clip(mixed, blocks=4)
    flow, _ = apply_clip(params, mixed, *clip)
    assert error(flow, block_by_block(params, mixed, clip)[0]) < 2e-5  # as in test_forms


@pytest.mark.parametrize(
    ("memories", "message"),
    [
        ({"kind": "windw"}, r"memories\[0\]\.kind=windw is no memory; did you mean window\?"),
        ({"kind": "cubes"}, "known are softmax_cache, gated_delta, window"),
        ({"kind": "window", "settings": {"sink": 0, "frames": 1}}, "frames=1 must be at least"),
        ({"kind": "window", "settings": {"sink": 5, "frames": 4}}, "sink=5 must not be longer"),
        ({"kind": "window", "settings": {"sink": -1}}, "sink=-1 must not be negative"),
        ({"kind": "window", "settings": {"sunk": 3}}, "settings.sunk is unknown"),
        ({"kind": "window", "settings": {"sink": 2.5}}, "sink=2.5 must be a whole number"),
        ({"kind": "window", "layers": (0,)}, "has layer 0, which model.hybrid_layers has too"),
        ({"kind": "window", "layers": (3,)}, r"\[3\], outside 0\.\.2"),
        ({"kind": "gated_delta"}, "must be set by model.hybrid_layers"),
        ({"sort": "window"}, "must be a mapping with kind"),
    ],
)
def test_misfits_are_one_line(cfg, memories, message):
    with pytest.raises(ConfigError, match=message) as error:
        dataclasses.replace(cfg, memories=(memories,))
    assert "model.memories[0]" in str(error.value) and "\n" not in str(error.value)


def test_every_layer_has_one_memory(cfg):
    window = {"kind": "window"}
    with pytest.raises(ConfigError, match="has 2 entries without layers"):
        dataclasses.replace(cfg, memories=(window, window))
    with pytest.raises(ConfigError, match="names no layers, and every layer has another"):
        dataclasses.replace(cfg, hybrid_layers=(0, 1, 2), memories=(window,))
    with pytest.raises(ConfigError, match=r"has layer 2, which model.memories\[0\].layers has too"):
        dataclasses.replace(cfg, memories=(window | {"layers": (2,)},) * 2)


def test_one_line_makes_the_released_mixture():
    window = MemorySpec("window", WindowConfig(sink=3, frames=9))
    cfg = ModelConfig.wan1p3b(hybrid_layers=range(22), memories=(window,))
    assert cfg.layer_runs() == [(0, 22), (22, 30)]
    assert models.unbounded_layers(cfg) == ()
    assert cfg.teacher() == ModelConfig.wan1p3b()
    delta, kept = jax.eval_shape(
        lambda: models.init_memory(cfg, batch=1, frames=None, tokens_per_frame=1560)
    )
    assert delta.shape == (22, 1, 12, 128, 128)
    assert kept.sink_k.shape == (8, 1, 3 * 1560, 12, 128)
    assert kept.k.shape == (8, 1, 6 * 1560, 12, 128)
