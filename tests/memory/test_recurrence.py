"""The rule of the memory and its ablations against loops over tokens in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax.config import GatedDeltaConfig
from arl2_jax.memory.recurrence import Writes, running_reads, state_after, states_before

BLOCKS, TOKENS, HEADS, K, V = 3, 6, 2, 4, 5
SETTINGS = {
    "published": GatedDeltaConfig(),
    "additive": GatedDeltaConfig(rule="additive"),
    "one block": GatedDeltaConfig(span="block"),
    "one block, additive": GatedDeltaConfig(span="block", rule="additive"),
}


def draw(seed=0):
    rng = np.random.default_rng(seed)
    shape = (2, BLOCKS * TOKENS, HEADS)
    k = rng.standard_normal((*shape, K))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.standard_normal((*shape, V))
    g, beta = -rng.uniform(0, 0.4, shape), rng.uniform(0, 2, shape)
    state = rng.standard_normal((2, HEADS, K, V))
    q = rng.standard_normal((*shape, K))
    return Writes(k, v, g, beta), state, q


def step(settings, state, k, v, g, beta):
    """One token of one head."""
    state = np.exp(g) * state
    held = state.T @ k if settings.rule == "delta" else 0
    return state + beta * np.outer(k, v - held)


def loop(settings, writes, state, q):
    """States before every block and after the last, and reads after every token."""
    batch, time = writes.g.shape[:2]
    states = np.empty((batch, BLOCKS + 1, HEADS, K, V))
    reads = np.empty((batch, time, HEADS, V))
    for b in range(batch):
        for h in range(HEADS):
            S = state[b, h]
            for t in range(time):
                if t % TOKENS == 0:
                    states[b, t // TOKENS, h] = S
                    if settings.span == "block":
                        S = np.zeros_like(S)
                S = step(settings, S, *(x[b, t, h] for x in writes))
                reads[b, t, h] = S.T @ q[b, t, h]
            states[b, -1, h] = S
    return states, reads


@pytest.mark.parametrize("name", SETTINGS)
def test_states_are_those_of_the_loop(name, error):
    settings, (writes, state, q) = SETTINGS[name], draw()
    wanted, _ = loop(settings, writes, state, q)
    given = Writes(*(jnp.asarray(x, jnp.float32) for x in writes))
    begin = jnp.asarray(state, jnp.float32)
    found = states_before(settings, given, begin, BLOCKS)
    assert error(found, wanted[:, :-1]) < 2e-6  # float32 sums of 18 tokens
    last = Writes(*(x[:, -TOKENS:] for x in given))
    assert error(state_after(settings, last, found[:, -1]), wanted[:, -1]) < 2e-6


@pytest.mark.parametrize("name", ["published", "additive"])
def test_running_reads_are_those_of_the_loop(name, error):
    settings, (writes, state, q) = SETTINGS[name], draw(1)
    _, wanted = loop(settings, writes, state, q)
    given = Writes(*(jnp.asarray(x, jnp.float32) for x in writes))
    found = running_reads(settings, jnp.asarray(q, jnp.float32), given, jnp.float32(state))
    assert error(found, wanted) < 2e-6


@pytest.mark.parametrize("name", ["additive", "one block"])
def test_gradients_are_those_of_differences(name):
    settings, (writes, state, _) = SETTINGS[name], draw(2)
    given = Writes(*(jnp.asarray(x, jnp.float32) for x in writes))
    weight = jnp.asarray(np.random.default_rng(3).standard_normal((2, BLOCKS, HEADS, K, V)))

    def loss(v, k):
        states = states_before(settings, given._replace(v=v, k=k), jnp.float32(state), BLOCKS)
        return jnp.sum(weight * states)

    gradients = jax.grad(loss, (0, 1))(given.v, given.k)
    rng = np.random.default_rng(4)
    directions = [jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for x in gradients]
    move = lambda s: (given.v + s * directions[0], given.k + s * directions[1])
    slope = (loss(*move(1e-2)) - loss(*move(-1e-2))) / 2e-2
    found = sum(jnp.sum(x * d) for x, d in zip(gradients, directions, strict=True))
    # Central differences of a smooth function in float32.
    np.testing.assert_allclose(found, slope, rtol=2e-3)


@pytest.mark.parametrize(
    "delta",
    [
        dict(read="token"),
        dict(rule="additive", decay="none"),
        dict(span="block", beta_max=1.0),
        dict(read="token", rule="additive", beta_max=0.5),
        dict(leak=0.4),
        dict(read="token", decay="none", leak=0.4),
    ],
    ids=str,
)
def test_clip_and_blocks_agree(
    cfg, make_params, make_clip, apply_clip, block_by_block, error, delta
):
    varied = dataclasses.replace(cfg, delta=GatedDeltaConfig(**delta))
    params, clip = make_params(varied), make_clip(varied)
    flow, _ = apply_clip(params, varied, *clip)
    wanted, _ = block_by_block(params, varied, clip)
    assert error(flow, wanted) < 1e-5  # three layers in float32
    published, _ = apply_clip(params, cfg, *clip)
    assert error(flow, published) > 1e-3  # the setting has an effect
