"""Drawing under an exchange is a loop of `apply` that reads other memories than it writes."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax import models
from arl2_jax.config import SamplerConfig
from arl2_jax.diffusion import sample
from arl2_jax.generation.exchange import (
    EXCHANGES,
    OfLayers,
    draw_exchanged,
    exchanges_of,
    swap_twins,
    twin_noise,
)
from arl2_jax.generation.rollout import rollout

SAMPLER = SamplerConfig(timesteps=(1000.0, 500.0))
KEYS = jax.random.split(jax.random.key(3), 2)


@pytest.fixture(scope="module")
def clip(make_clip, cfg):
    """Two pairs; the text of twins is one, their latents have nothing in common."""
    clip = make_clip(cfg, blocks=4, batch=4)
    return clip._replace(text=clip.text.at[1::2].set(clip.text[::2]))


def draw(params, cfg, clip, block, *exchanges):
    made = draw_exchanged(
        params, cfg, SAMPLER, clip.text, KEYS, clip.clean, jnp.int32(block), exchanges=exchanges
    )
    return np.asarray(made)


def by_hand(apply, params, cfg, clip, block, exchange):
    """Clean blocks are written and the last is drawn, one call after the other."""
    f, batch = cfg.frames_per_block, len(clip.text)
    empty = models.init_memory(cfg, batch=batch, frames=clip.clean.shape[1], tokens_per_frame=6)
    zero = jnp.zeros((batch, f))
    runs = cfg.layer_runs()

    name, layers = exchange if isinstance(exchange, OfLayers) else (exchange, range(9))

    def seen(memory, undisturbed):
        kinds = {"states": "gated_delta", "zeroed": "gated_delta", "caches": "softmax_cache"}
        read = []
        for (start, _), own, theirs in zip(runs, memory, undisturbed, strict=True):
            if kinds.get(name) != cfg.memory_of(start).kind:
                read.append(own)
                continue
            other = jax.tree.map(lambda x: x[:, np.arange(batch) ^ 1], theirs)
            if name == "zeroed":
                other = jax.tree.map(jnp.zeros_like, own)
            chosen = [i for i in range(own[0].shape[0]) if start + i in layers]
            put = lambda x, y, chosen=np.array(chosen, int): x.at[chosen].set(y[chosen])
            read.append(jax.tree.map(put, own, other))
        return tuple(read)

    memory = undisturbed = empty
    for i in range(block):
        step = functools.partial(
            apply, params, cfg, clip.clean[:, i * f : (i + 1) * f], zero, clip.text,
            position=jnp.int32(i * f), write=True,
        )  # fmt: skip
        memory = step(memory=memory, read=seen(memory, undisturbed))[1]
        undisturbed = step(memory=undisturbed)[1]
    read = seen(memory, undisturbed)
    flow = lambda x, s: apply(
        params, cfg, x, zero + 1000 * s, clip.text, memory=read, position=jnp.int32(block * f)
    )[0]
    shape = (batch, f, *clip.clean.shape[2:])
    return np.stack([sample(flow, jax.random.split(key)[1], shape, SAMPLER) for key in KEYS])


def test_reading_the_own_memory_is_the_default_bit_for_bit(params, cfg, clip):
    # Operation by operation: XLA rounds one sum differently in two whole programs.
    apply = models.apply
    memory = models.init_memory(cfg, batch=4, frames=8, tokens_per_frame=6)
    now = dict(memory=memory, position=jnp.int32(0), write=True)
    block, level = clip.clean[:, :2], clip.timestep[:, :2]
    _, memory = apply(params, cfg, block, level, clip.text, **now)
    now |= dict(memory=memory, position=jnp.int32(2))
    default = apply(params, cfg, block, level, clip.text, **now)
    given = apply(params, cfg, block, level, clip.text, **now, read=memory)
    chex.assert_trees_all_equal(default, given)


def test_what_is_read_is_not_what_is_written(params, cfg, clip, apply):
    """The first layer's memory depends only on its past and tokens, not on what is read."""
    empty = models.init_memory(cfg, batch=4, frames=8, tokens_per_frame=6)
    block, level = clip.clean[:, :2], clip.timestep[:, :2]
    run = lambda memory, **now: apply(
        params, cfg, block, level, clip.text, memory=memory, position=jnp.int32(0), **now
    )
    full = run(empty, write=True)[1]
    flow, memory = run(full, write=True, read=empty)
    # Another program, whose float32 sums may be in another order.
    np.testing.assert_allclose(flow, run(empty)[0], atol=1e-5)
    assert np.abs(flow - run(full)[0]).max() > 1e-3
    np.testing.assert_array_equal(memory[0][0], run(full, write=True)[1][0][0])
    np.testing.assert_array_equal(run(full, read=empty)[1][0], full[0])


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_drawing_is_the_loop(params, cfg, clip, apply, error, exchange):
    found = draw(params, cfg, clip, 3, *EXCHANGES)[EXCHANGES.index(exchange)]
    # Errors of float32 rounding, in another order of sums.
    assert error(found, by_hand(apply, params, cfg, clip, 3, exchange)) < 2e-5


PARTS = (
    OfLayers("caches", (1, 2)), OfLayers("states", (0,)), OfLayers("zeroed", (3,)),
    OfLayers("caches", (2,)),
)  # fmt: skip


@pytest.fixture(scope="module")
def four(cfg, make_params):
    """A model whose runs of both kinds have layers to choose from: hybrid, softmax twice, hybrid.

    Layer 2 adds nothing of its attention.
    """
    cfg = dataclasses.replace(cfg, num_layers=4, hybrid_layers=(0, 3))
    params = make_params(cfg)
    silent = params["blocks"]["2"]["self_attn"]["o"]
    params["blocks"]["2"]["self_attn"]["o"] = jax.tree.map(jnp.zeros_like, silent)
    return params, cfg


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS[:3], ids=lambda part: part.name)
def test_drawing_with_some_layers_exchanged_is_the_loop(four, clip, apply, error, part):
    found = draw(*four, clip, 3, "none", *PARTS)[1 + PARTS.index(part)]
    # Errors of float32 rounding, in another order of sums.
    assert error(found, by_hand(apply, *four, clip, 3, part)) < 2e-5


def test_a_layer_that_adds_nothing_carries_nothing(four, clip):
    """Exactly: the attention of layer 2 is multiplied by zero."""
    own, both, _, _, silent = draw(*four, clip, 3, "none", *PARTS)
    np.testing.assert_array_equal(silent, own)
    assert np.abs(both - own).max() > 1e-3


def test_all_layers_that_have_the_memory_are_the_whole_exchange(four, clip):
    every = OfLayers("caches", (1, 2)), OfLayers("states", (0, 3)), OfLayers("zeroed", (0, 3))
    made = draw(*four, clip, 3, "caches", "states", "zeroed", *every)
    np.testing.assert_array_equal(made[:3], made[3:])


def test_exchanges_have_their_effect(params, cfg, clip):
    made = draw(params, cfg, clip, 3, *EXCHANGES)
    for i in range(len(made)):
        for j in range(i):
            assert np.abs(made[i] - made[j]).max() > 1e-3


def test_nothing_exchanged_continues_the_past_like_a_rollout(params, cfg, clip, error):
    key = jax.random.key(5)
    past, frame = clip.clean[:, :4], clip.clean.shape[2:]
    wanted = rollout(params, cfg, SAMPLER, clip.text, key, blocks=1, shape=frame, past=past)
    found = draw_exchanged(
        params, cfg, SAMPLER, clip.text, key[None], clip.clean[:, :6], jnp.int32(2)
    )
    assert error(found[0, 0], wanted) < 2e-5  # float32 rounding, in another order of sums


def test_an_exchange_does_not_depend_on_the_others(params, cfg, clip):
    together = draw(params, cfg, clip, 3, *EXCHANGES)
    np.testing.assert_array_equal(draw(params, cfg, clip, 3, "zeroed", "states"), together[[3, 1]])


@pytest.mark.parametrize("hybrid", [(0, 1, 2), ()], ids=["states", "caches"])
def test_all_memories_of_the_twin_draw_what_the_twin_draws(cfg, make_params, clip, hybrid):
    """From the same noise, exactly: a block sees the past only through memories."""
    cfg = dataclasses.replace(cfg, hybrid_layers=hybrid)
    params, made = make_params(cfg), exchanges_of(cfg)
    twins = clip._replace(clean=swap_twins(clip.clean))
    for block in (1, 3):
        own, exchanged, *_ = draw(params, cfg, clip, block, *made)
        theirs, back, *_ = draw(params, cfg, twins, block, *made)
        np.testing.assert_array_equal(exchanged, theirs)
        np.testing.assert_array_equal(back, own)
        assert np.abs(own - exchanged).max() > 1e-3


def test_twins_are_written_with_the_same_noise(cfg, make_params, clip):
    """Otherwise one of them, with all memories of the other, would differ from the other."""
    cfg = dataclasses.replace(cfg, hybrid_layers=(0, 1, 2))
    params, noisy = make_params(cfg), dataclasses.replace(SAMPLER, context_noise=0.3)
    run = lambda clean: draw_exchanged(
        params, cfg, noisy, clip.text, KEYS, clean, jnp.int32(2), exchanges=("none", "states")
    )
    own, exchanged = run(clip.clean)
    np.testing.assert_array_equal(exchanged, run(swap_twins(clip.clean))[0])
    assert np.abs(own - exchanged).max() > 1e-3
    clean = draw_exchanged(params, cfg, SAMPLER, clip.text, KEYS, clip.clean, jnp.int32(2))
    assert np.abs(own - clean[0]).max() > 1e-3
    eps = twin_noise(jax.random.key(0), (4, 500))
    np.testing.assert_array_equal(eps[::2], eps[1::2])
    assert abs(np.corrcoef(eps[::2])[0, 1]) < 0.2  # pairs are independent; 1 / sqrt(500) = 0.04


def test_zeroed_states_are_an_empty_memory(cfg, make_params, clip, apply):
    """An all-hybrid model that reads zeros draws as if there were no past at all."""
    cfg = dataclasses.replace(cfg, hybrid_layers=(0, 1, 2))
    params, f = make_params(cfg), cfg.frames_per_block
    *_, found = draw(params, cfg, clip, 3, *exchanges_of(cfg))
    other = clip._replace(clean=clip.clean[::-1] + 1)
    np.testing.assert_array_equal(found, draw(params, cfg, other, 3, *exchanges_of(cfg))[-1])
    empty = models.init_memory(cfg, batch=4, frames=8, tokens_per_frame=6)
    flow = lambda x, s: apply(
        params, cfg, x, jnp.full((4, f), 1000 * s), clip.text, memory=empty,
        position=jnp.int32(3 * f),
    )[0]  # fmt: skip
    key = jax.random.split(KEYS[0])[1]
    wanted = sample(flow, key, (4, f, *clip.clean.shape[2:]), SAMPLER)
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)


def test_one_compilation_serves_all_blocks(params, cfg, clip):
    draw(params, cfg, clip, 3, *EXCHANGES)
    before = draw_exchanged._cache_size()
    first, second = (draw(params, cfg, clip, block, *EXCHANGES)[0] for block in (1, 2))
    assert draw_exchanged._cache_size() == before
    assert np.abs(first - second).max() > 1e-3


def test_guidance_exchanges_both_halves(cfg, make_params, clip):
    cfg = dataclasses.replace(cfg, hybrid_layers=(0, 1, 2))
    params = make_params(cfg)
    guided = SamplerConfig(method="euler", steps=2, guidance=3.0)
    run = lambda clean: draw_exchanged(
        params, cfg, guided, clip.text, KEYS, clean, jnp.int32(2), exchanges=("none", "states")
    )
    own, exchanged = run(clip.clean)
    np.testing.assert_array_equal(exchanged, run(swap_twins(clip.clean))[0])
    assert np.abs(own - exchanged).max() > 1e-3


def test_swapping_twice_is_the_identity():
    x = jnp.arange(24).reshape(2, 6, 2)
    once = swap_twins(x, axis=1)
    np.testing.assert_array_equal(once[0, :, 0], [2, 0, 6, 4, 10, 8])
    np.testing.assert_array_equal(swap_twins(once, axis=1), x)


def test_models_have_the_exchanges_of_their_memories(cfg):
    change = functools.partial(dataclasses.replace, cfg)
    assert exchanges_of(cfg) == EXCHANGES
    assert exchanges_of(cfg.teacher()) == ("none", "caches")
    assert exchanges_of(change(hybrid_layers=(0, 1, 2))) == ("none", "states", "zeroed")
    for gate in ("zero", "local"):
        assert exchanges_of(change(memory_gate=gate)) == ("none", "caches")
        assert exchanges_of(change(memory_gate=gate, hybrid_layers=(0, 1, 2))) == ("none",)


def test_what_cannot_be_exchanged_is_refused(params, cfg, clip):
    odd = clip._replace(clean=clip.clean[:3], text=clip.text[:3])
    with pytest.raises(ValueError, match="twins come in pairs"):
        draw(params, cfg, odd, 1, "none")
    with pytest.raises(ValueError, match=r"\['state'\]; known are none, states"):
        draw(params, cfg, clip, 1, "state")
    with pytest.raises(ValueError, match=r"'states' is of layers \[2\]"):
        draw(params, cfg, clip, 1, OfLayers("states", (1, 2)))
    with pytest.raises(ValueError, match=r"'caches' is of layers \[3\]"):
        draw(params, cfg, clip, 1, OfLayers("caches", (2, 3)))
