"""Samplers of flows that are known exactly."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax.config import SamplerConfig
from arl2_jax.diffusion import noise_levels, sample

SHAPE = (2, 3, 2, 2, 4)
FEW_STEP = SamplerConfig()
EULER = SamplerConfig(method="euler", steps=20)


def test_few_step_levels_are_the_shifted_list():
    np.testing.assert_allclose(noise_levels(FEW_STEP), [1, 0.9375, 5 / 6, 0.625], rtol=1e-7)
    two = SamplerConfig(timesteps=(1000.0, 500.0), shift=1.0)
    np.testing.assert_allclose(noise_levels(two), [1, 0.5])


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_euler_levels_fall_from_noise_to_just_before_data(shift):
    levels = noise_levels(SamplerConfig(method="euler", steps=4, shift=shift))
    s = np.asarray([1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(levels, shift * s / (1 + (shift - 1) * s), rtol=1e-7)
    assert levels.dtype == np.float32


@pytest.mark.parametrize("sampler", [FEW_STEP, EULER], ids=["few_step", "euler"])
def test_point_is_found(sampler):
    """If all data are one point, the flow at x is (x - point) / s."""
    point = jax.random.normal(jax.random.key(1), SHAPE)
    found = sample(lambda x, s: (x - point) / s, jax.random.key(0), SHAPE, sampler)
    np.testing.assert_allclose(found, point, atol=2e-6)  # a rounding in each step


@pytest.mark.parametrize("sampler", [FEW_STEP, EULER], ids=["few_step", "euler"])
def test_levels_reach_the_network_in_order(sampler):
    seen = []

    def flow(x, s):
        jax.debug.callback(lambda s: seen.append(float(s)), s, ordered=True)
        return jnp.zeros_like(x)

    jax.block_until_ready(sample(flow, jax.random.key(0), SHAPE, sampler))
    jax.effects_barrier()
    np.testing.assert_array_equal(np.float32(seen), noise_levels(sampler))


def test_few_step_adds_fresh_noise_at_every_step():
    """A network that always predicts x0 = 0 sees only the noise."""
    seen = []

    def flow(x, s):
        jax.debug.callback(lambda x, s: seen.append(np.asarray(x) / s), x, s, ordered=True)
        return x / s

    found = sample(flow, jax.random.key(0), (64, 2, 4, 4, 4), FEW_STEP)
    jax.effects_barrier()
    np.testing.assert_allclose(found, 0, atol=1e-6)
    noise = np.stack([x.ravel() for x in seen])
    # 8192 draws: correlations and means of a hundredth, deviations of one to as much.
    np.testing.assert_allclose(np.cov(noise), np.eye(4), atol=0.06)
    np.testing.assert_allclose(noise.mean(axis=1), 0, atol=0.05)


def test_euler_is_its_closed_form_on_a_linear_flow():
    sampler = SamplerConfig(method="euler", steps=7, shift=3.0)
    found = sample(lambda x, s: 0.5 * x + 2, jax.random.key(0), SHAPE, sampler)
    first = sample(lambda x, s: 0 * x, jax.random.key(0), SHAPE, sampler)  # the noise itself
    x = np.float64(first)
    levels = np.append(np.float64(noise_levels(sampler)), 0)
    for s, s_next in itertools.pairwise(levels):
        x = (1 + 0.5 * (s_next - s)) * x + 2 * (s_next - s)
    np.testing.assert_allclose(found, x, atol=1e-6)
    np.testing.assert_allclose(x.mean(), 4 * (np.exp(-0.5) - 1), atol=0.25)  # noise of 96 values


def test_euler_recovers_a_gaussian():
    """Data N(3, 0.5^2): the ideal flow is known, and 100 steps follow it."""

    def flow(x, s):
        variance = (0.5 * (1 - s)) ** 2 + s**2
        x0 = 3 + 0.25 * (1 - s) / variance * (x - 3 * (1 - s))
        eps = s / variance * (x - 3 * (1 - s))
        return eps - x0

    sampler = SamplerConfig(method="euler", steps=100, shift=1.0)
    found = sample(flow, jax.random.key(0), (40, 5, 5, 5, 4), sampler)
    # 20,000 draws and steps of 1 / 100.
    assert abs(float(found.mean()) - 3) < 0.02
    assert abs(float(found.std()) - 0.5) < 0.02


def test_key_decides():
    flow = lambda x, s: x
    one, again, other = (sample(flow, jax.random.key(i), SHAPE, FEW_STEP) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - other).min() > 0
