"""A rollout is a loop of `apply`: denoise, write, repeat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax import models
from arl2_jax.config import SamplerConfig
from arl2_jax.diffusion import add_noise, draw_noise, sample
from arl2_jax.generation import rollout as rollouts
from arl2_jax.generation.rollout import rollout

FRAME = (4, 6, 4)
SAMPLERS = {
    "few_step": SamplerConfig(timesteps=(1000.0, 500.0)),
    "euler": SamplerConfig(method="euler", steps=3),
    "guided": SamplerConfig(method="euler", steps=3, guidance=4.0),
    "noisy": SamplerConfig(timesteps=(1000.0, 500.0), context_noise=0.3),
}
KEY = jax.random.key(7)


def by_hand(apply, params, cfg, sampler, text, *, blocks, past=None):
    """Generate blocks one by one; with guidance, those without text have a separate memory."""
    f, batch = cfg.frames_per_block, text.shape[0]
    given = 0 if past is None else past.shape[1]
    empty = models.init_memory(cfg, batch=batch, frames=given + blocks * f, tokens_per_frame=6)
    texts = (text, 0 * text) if sampler.guidance > 1 else (text,)
    memories, key, made = [empty] * len(texts), KEY, []
    zero = jnp.zeros((batch, f))
    level = zero + sampler.context_noise

    def write(key, block, position):
        now = dict(position=jnp.int32(position), write=True)
        if sampler.context_noise:
            key, own = jax.random.split(key)
            block = add_noise(block, draw_noise(own, block.shape), level)
        return key, [
            apply(params, cfg, block, 1000 * level, t, memory=m, **now)[1]
            for t, m in zip(texts, memories, strict=True)
        ]

    for first in range(0, given, f):
        key, memories = write(key, past[:, first : first + f], first)
    for i in range(blocks):
        position = given + i * f

        def flow(x, s, memories=memories, position=position):
            flows = [
                apply(params, cfg, x, zero + 1000 * s, t, memory=m, position=jnp.int32(position))[0]
                for t, m in zip(texts, memories, strict=True)
            ]
            if len(flows) == 1:
                return flows[0]
            return sampler.guidance * flows[0] + (1 - sampler.guidance) * flows[1]

        key, own = jax.random.split(key)
        made.append(sample(flow, own, (batch, f, *FRAME), sampler))
        key, memories = write(key, made[-1], position)
    return jnp.concatenate(made, axis=1)


# Guidance takes Euler steps too.
@pytest.mark.parametrize(
    "name",
    [*(pytest.param(n, marks=pytest.mark.slow) for n in ("few_step", "euler")), "guided", "noisy"],
)
def test_rollout_is_the_loop(params, cfg, clip, apply, error, name):
    """Four blocks after a given one: beyond the three of a training clip."""
    arguments = (params, cfg, SAMPLERS[name], clip.text)
    past = clip.clean[:, :2]
    found = rollout(*arguments, KEY, blocks=4, shape=FRAME, past=past)
    assert found.shape == (2, 8, *FRAME) and found.dtype == jnp.float32
    # Errors of float32 rounding grow from block to block, as each is made from the last.
    assert error(found, by_hand(apply, *arguments, blocks=4, past=past)) < 2e-4


def test_rollout_from_nothing_begins_at_position_zero(params, cfg, clip, apply, error):
    arguments = (params, cfg, SAMPLERS["few_step"], clip.text)
    found = rollout(*arguments, KEY, blocks=2, shape=FRAME)
    assert error(found, by_hand(apply, *arguments, blocks=2)) < 2e-4


def test_level_zero_is_a_clean_pass_bit_for_bit(params, cfg, clip):
    """The same result as a program that always writes at timestep 0."""
    sampler, shape = SAMPLERS["few_step"], (2, 2, *FRAME)

    @jax.jit
    def clean_pass(params, text, past):
        context, state = rollouts.init_rollout(
            params, cfg, sampler, text, KEY, frames=6, tokens_per_frame=6
        )

        def write(state, block):
            memory = models.apply(
                context.params, cfg, block, jnp.zeros((2, 2)), context.text,
                memory=state.memory, position=state.position, write=True,
            )[1]  # fmt: skip
            return state._replace(memory=memory, position=state.position + 2)

        def generate(state, _):
            state, block = rollouts.denoise_block(context, cfg, sampler, state, shape)
            return write(state, block), block

        return jax.lax.scan(generate, write(state, past), length=2)

    @jax.jit
    def with_level(params, text, past):
        context, state = rollouts.init_rollout(
            params, cfg, sampler, text, KEY, frames=6, tokens_per_frame=6
        )
        state = rollouts.write_block(context, cfg, sampler, state, past)
        generate = lambda state, _: rollouts.generate_block(context, cfg, sampler, state, shape)
        return jax.lax.scan(generate, state, length=2)

    found, wanted = (f(params, clip.text, clip.clean[:, :2]) for f in (with_level, clean_pass))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def test_past_has_its_influence(params, cfg, clip):
    run = functools.partial(
        rollout, params, cfg, SAMPLERS["few_step"], clip.text, KEY, blocks=4, shape=FRAME
    )
    one, same, other = (run(past=clip.clean[:, :2] + shift) for shift in (0.0, 0.0, 0.5))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.01


def test_memory_grows_with_softmax_layers_alone(cfg, clip):
    def size(cfg, frames):
        def begin(text):
            return rollouts.init_rollout(
                models.init_params(cfg, KEY), cfg, SAMPLERS["guided"], text, KEY,
                frames=frames, tokens_per_frame=6,
            )[1].memory  # fmt: skip

        return jax.eval_shape(begin, clip.text)

    hybrid = dataclasses.replace(cfg, hybrid_layers=(0, 1, 2))
    assert size(hybrid, 2) == size(hybrid, 2000)
    (delta, short), (same, long) = size(cfg, 2), size(cfg, 2000)
    assert delta == same and delta.shape == (2, 4, 2, 16, 16)  # guided: batches of two, twice
    assert (short.k.shape[2], long.k.shape[2]) == (12, 12000)
