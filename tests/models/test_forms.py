"""The same network in all its forms: blocks, clip, scan over layers, rematerialised, bfloat16."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax import models
from arl2_jax.config import ModelConfig
from arl2_jax.models import wan

# float32 sums of up to a hundred terms in another order, through three layers.
CLOSE = 2e-5

SHAPES = {
    "mixed": (dict(), dict()),
    "head_6_frame_wise_odd_grid": (
        dict(dim=18, num_heads=3, frames_per_block=1, hybrid_layers=(1,)),
        dict(blocks=4, rows=6, columns=10, batch=1),
    ),
    "head_10_three_frames": (
        dict(dim=20, frames_per_block=3, num_layers=2, hybrid_layers=(1,)),
        dict(blocks=2, rows=6, columns=2, batch=1),
    ),
    "head_32_all_hybrid": (
        dict(dim=32, num_heads=1, num_layers=2, hybrid_layers=(0, 1)),
        dict(blocks=4, rows=2, columns=6, batch=1),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_clip_form_is_block_form(
    cfg, make_params, make_clip, apply_clip, block_by_block, error, name
):
    changes, shape = SHAPES[name]
    cfg = dataclasses.replace(cfg, **changes)
    params, clip = make_params(cfg), make_clip(cfg, **shape)
    flow, _ = apply_clip(params, cfg, *clip)
    wanted, _ = block_by_block(params, cfg, clip)
    assert flow.dtype == jnp.float32
    assert error(flow, wanted) < CLOSE


@pytest.fixture(scope="module")
def clip_gradient(params, cfg, clip, target):
    """Gradients with respect to the parameters, by way of rematerialising."""

    @functools.cache
    def gradient(remat, dtype="float32"):
        changed = dataclasses.replace(cfg, remat=remat, dtype=dtype)
        loss = lambda p: jnp.mean(jnp.square(models.apply_clip(p, changed, *clip)[0] - target))
        return jax.jit(jax.value_and_grad(loss))(params)

    return gradient


@pytest.fixture(scope="module")
def target(clip):
    return jax.random.normal(jax.random.key(3), clip.noisy.shape)


def assert_gradients_close(found, wanted, error, limit):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        assert np.any(b), jax.tree_util.keystr(path)  # every parameter matters
        assert error(a, b) < limit, jax.tree_util.keystr(path)


def test_gradients_of_clip_form_are_those_of_block_form(
    params, cfg, clip, target, clip_gradient, error
):
    f = cfg.frames_per_block
    split = lambda x: jnp.moveaxis(x.reshape(x.shape[0], -1, f, *x.shape[2:]), 1, 0)
    blocks = tuple(split(x) for x in (*clip[:3], target))
    empty = models.init_memory(cfg, batch=2, frames=6, tokens_per_frame=6)

    def loss(params):
        def step(carry, block):
            memory, position = carry
            clean, noisy, timestep, wanted = block
            run = functools.partial(
                models.apply, params, cfg, text=clip.text, memory=memory, position=position
            )
            flow, _ = run(latents=noisy, timestep=timestep)
            _, memory = run(latents=clean, timestep=0 * timestep, write=True)
            return (memory, position + f), jnp.mean(jnp.square(flow - wanted))

        return jnp.mean(jax.lax.scan(step, (empty, jnp.int32(0)), blocks)[1])

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    wanted_value, wanted = clip_gradient("none")
    np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
    # Ten times the values' bound: gradients add up over tokens with both signs.
    assert_gradients_close(gradient, wanted, error, 10 * CLOSE)


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "layer"])
def test_rematerialised_is_the_same(clip_gradient, error, remat):
    value, gradient = clip_gradient(remat)
    wanted_value, wanted = clip_gradient("none")
    np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
    assert_gradients_close(gradient, wanted, error, CLOSE)


def test_scanned_layers_are_single_layers(params, cfg, clip, apply_clip, error):
    @jax.jit
    def unrolled(params):
        stem = wan.make_stem(cfg, {n: node for n, node in params.items() if n != "blocks"})
        tokens = wan.embed_clip(stem, cfg, *clip)
        x = tokens.x
        for i in range(cfg.num_layers):
            layer = wan.make_layer(cfg, i, params["blocks"][str(i)])
            context = layer.cross_attn.encode(tokens.text)
            x, _ = layer.clip(x, tokens.conditions, context, blocks=3, copies=2)
        return stem.predict_flow(x[1::2], tokens.time, 4, 6)

    flow, _ = apply_clip(params, cfg, *clip)
    assert error(flow, unrolled(params)) < CLOSE


def test_stacked_parameters_and_encoded_text_may_be_made_once(params, cfg, clip, apply):
    memory = models.init_memory(cfg, batch=2, frames=2, tokens_per_frame=6)
    prepare = jax.jit(
        lambda p, text: (models.compute_params(p, cfg), models.encode_text(p, cfg, text))
    )
    stacked, text = prepare(params, clip.text)
    block = (clip.noisy[:, :2], clip.timestep[:, :2])
    once, _ = apply(stacked, cfg, *block, text, memory=memory, position=jnp.int32(0))
    anew, _ = apply(params, cfg, *block, clip.text, memory=memory, position=jnp.int32(0))
    np.testing.assert_allclose(once, anew, atol=1e-5)  # another program, the same sums


def test_bfloat16_is_close_and_keeps_what_must_be_exact(
    params, cfg, clip, apply, apply_clip, error
):
    half = dataclasses.replace(cfg, dtype="bfloat16")
    flow, _ = apply_clip(params, half, *clip)
    wanted, _ = apply_clip(params, cfg, *clip)
    # bfloat16 has 8 bits, 2^-9 a rounding; tens of them through three layers.
    assert 1e-4 < error(flow, wanted) < 3e-2
    assert flow.dtype == jnp.float32
    memory = models.init_memory(half, batch=2, frames=2, tokens_per_frame=6)
    _, memory = apply(
        params, half, clip.clean[:, :2], 0 * clip.timestep[:, :2], clip.text,
        memory=memory, position=jnp.int32(0), write=True,
    )  # fmt: skip
    assert memory[0].dtype == jnp.float32
    assert {x.dtype for x in memory[1]} == {jnp.dtype(jnp.bfloat16)}


def test_bfloat16_gradients_are_float32_and_close(clip_gradient, error):
    _, gradient = clip_gradient("none", "bfloat16")
    _, wanted = clip_gradient("none")
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    # As for values, with sums that cancel; the state's decay is the most sensitive.
    assert_gradients_close(gradient, wanted, error, 0.2)


@pytest.fixture(scope="module")
def without_ffn_updates(cfg, make_params):
    """An all-hybrid model whose layers differ from the teacher's in their memory alone."""
    cfg = dataclasses.replace(cfg, hybrid_layers=(0, 1, 2))
    params = make_params(cfg)
    for layer in params["blocks"].values():
        for name in ("lora_fc1", "lora_fc2"):
            layer["delta"][name]["b"] = 0 * layer["delta"][name]["b"]
    return cfg, params


@pytest.fixture(scope="module")
def each_block_alone(without_ffn_updates, clip, apply):
    """The softmax model on every noisy block as if it were the first."""
    cfg, params = without_ffn_updates
    teacher, f = cfg.teacher(), cfg.frames_per_block
    memory = models.init_memory(teacher, batch=2, frames=f, tokens_per_frame=6)
    flow = lambda first: apply(
        models.without_delta(params), teacher,
        clip.noisy[:, first : first + f], clip.timestep[:, first : first + f], clip.text,
        memory=memory, position=jnp.int32(0),
    )[0]  # fmt: skip
    return jnp.concatenate([flow(first) for first in range(0, 6, f)], axis=1)


def test_closed_gate_leaves_softmax_inside_the_block(
    without_ffn_updates, each_block_alone, clip, apply_clip, error
):
    cfg, params = without_ffn_updates
    memory_off = dataclasses.replace(cfg, memory_gate="zero")
    flow, diagnostics = apply_clip(params, memory_off, *clip)
    assert diagnostics == ({},)
    # Positions matter relative to each other only, so a later block may stand at zero.
    assert error(flow, each_block_alone) < CLOSE


def test_empty_memory_gives_nothing(without_ffn_updates, each_block_alone, clip, apply_clip, error):
    cfg, params = without_ffn_updates
    flow, _ = apply_clip(params, cfg, *clip)
    assert error(flow[:, :2], each_block_alone[:, :2]) < CLOSE
    assert error(flow[:, 2:], each_block_alone[:, 2:]) > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(latents=(1, 3, 4, 6, 4)), "multiple of frames_per_block=2"),
        (dict(latents=(1, 2, 5, 6, 4)), "multiples of the patch 2 x 2"),
        (dict(latents=(1, 2, 4, 6, 3)), "rows, columns, 4"),
        (dict(latents=(2, 4, 6, 4)), "latents have shape"),
        (dict(timestep=(1,)), "must be one per frame"),
    ],
)
def test_misfit_shapes_are_refused(params, cfg, change, message, unchecked):
    shapes = dict(latents=(1, 2, 4, 6, 4), timestep=(1, 2), text=(1, 4, 8)) | change
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes.values()]
    memory = models.init_memory(cfg, batch=1, frames=2, tokens_per_frame=6)
    run = lambda *arguments: models.apply(params, cfg, *arguments, memory=memory)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run, *arguments)


def test_memory_of_hybrid_layers_does_not_grow():
    cfg = ModelConfig.wan1p3b(hybrid_layers=tuple(range(22)))
    size = lambda frames: jax.eval_shape(
        lambda: models.init_memory(cfg, batch=1, frames=frames, tokens_per_frame=1560)
    )
    (short, _), (long, cache) = size(3), size(231)
    assert short == long
    assert (long.shape, long.dtype) == ((22, 1, 12, 128, 128), jnp.float32)
    assert cache.k.shape == (8, 1, 231 * 1560, 12, 128)
