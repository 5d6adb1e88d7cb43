"""Noise levels and steps of our samplers against Diffusers' scheduler of flow matching.

The scheduler gets its levels before the shift, as Wan lists them. Left to itself it ends its
list at the smallest training level, warped twice, where Wan's own list divides (0, 1] evenly.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_flow_match_euler_discrete as module

from arl2_jax.config import SamplerConfig
from arl2_jax.diffusion import draw_noise, noise_levels, sample

pytestmark = pytest.mark.parity

SHAPE = (2, 3, 4, 2, 5)
SAMPLERS = [
    SamplerConfig(),
    SamplerConfig(timesteps=(1000.0, 500.0), shift=3.0),
    SamplerConfig(timesteps=(1000.0,)),
    SamplerConfig(method="euler"),
    SamplerConfig(method="euler", steps=7, shift=8.0),
    SamplerConfig(method="euler", steps=1, shift=1.0),
]


def scheduler_of(sampler):
    if sampler.method == "few_step":
        levels = np.asarray(sampler.timesteps) / 1000
    else:
        levels = np.linspace(1, 0, sampler.steps + 1)[:-1]
    stochastic = sampler.method == "few_step"
    scheduler = FlowMatchEulerDiscreteScheduler(shift=sampler.shift, stochastic_sampling=stochastic)
    scheduler.set_timesteps(sigmas=levels.tolist())
    return scheduler


def test_training_levels():
    """All 1000 levels: a few-step list asks for levels that were trained."""
    trained = FlowMatchEulerDiscreteScheduler(shift=5.0).sigmas.numpy()
    ours = noise_levels(SamplerConfig(method="euler", steps=1000))
    np.testing.assert_allclose(ours, trained, rtol=2e-7)
    few = noise_levels(SamplerConfig(timesteps=(1000.0, 999.0, 750.0, 500.0, 250.0, 1.0)))
    np.testing.assert_array_equal(few, ours[[0, 1, 250, 500, 750, 999]])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_levels_and_steps(sampler, monkeypatch, error):
    scheduler = scheduler_of(sampler)
    np.testing.assert_allclose(noise_levels(sampler), scheduler.sigmas[:-1].numpy(), rtol=2e-7)

    first, *fresh = jax.random.split(jax.random.key(0), 1 + len(scheduler.timesteps))
    noises = iter([torch.tensor(np.asarray(draw_noise(key, SHAPE))) for key in fresh])
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(noises))
    target = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    x = torch.tensor(np.asarray(draw_noise(first, SHAPE)))
    for t in scheduler.timesteps:
        flow = (0.7 * x - torch.tensor(target)) * (0.5 + t / 1000)
        x = scheduler.step(flow, t, x).prev_sample

    flow = lambda x, s: (0.7 * x - jnp.asarray(target)) * (0.5 + s)
    found = sample(flow, jax.random.key(0), SHAPE, sampler)
    assert error(found, x) < 2e-6
