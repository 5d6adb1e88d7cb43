"""Samplers: from noise to clean latents, given a function that predicts the flow."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from arl2_jax.config import SamplerConfig
from arl2_jax.diffusion.flow_matching import draw_noise, shift_noise_levels

FlowFn = Callable[[Array, Array], Array]
# With a carry from one evaluation to the next.
CarryingFlowFn = Callable[[Array, Array, Any], tuple[Array, Any]]


def noise_levels(sampler: SamplerConfig) -> np.ndarray:
    """Return the falling noise levels at which the network is evaluated, float32 [steps]."""
    if sampler.method == "few_step":
        s = np.asarray(sampler.timesteps) / 1000
    else:
        s = np.linspace(1, 0, sampler.steps + 1)[:-1]
    return shift_noise_levels(s, sampler.shift).astype(np.float32)


def sample(
    flow_fn: FlowFn, key: Array, shape: tuple[int, ...], sampler: SamplerConfig
) -> Float[Array, "b f rows columns channels"]:
    """Denoise one frame block.

    Args:
      flow_fn: (x, s) -> flow of the block, both like x; s is a float32 scalar.
      key: random key of the block.
      shape: shape of the block's latents.
      sampler: few-step predicts x0 and adds fresh noise to it; Euler takes the step
        x + (s' - s) v along the flow.
    """
    return sample_carrying(lambda x, s, _: (flow_fn(x, s), None), None, key, shape, sampler)[0]


def sample_carrying(
    flow_fn: CarryingFlowFn,
    carry: Any,
    key: Array,
    shape: tuple[int, ...],
    sampler: SamplerConfig,
) -> tuple[Float[Array, "b f rows columns channels"], Any]:
    """Denoise one frame block, with a carry: (block, carry after the last evaluation).

    Args:
      flow_fn: (x, s, carry) -> (flow of the block, carry).
      carry: initial carry, a pytree of arrays.
      key, shape, sampler: as in `sample`.
    """
    levels = noise_levels(sampler)
    following = np.append(levels[1:], np.float32(0))
    first, *fresh = jax.random.split(key, 1 + len(levels))

    def few_step(x, flow, step):
        s, s_next, key = step
        x0 = x - s * flow
        return (1 - s_next) * x0 + s_next * draw_noise(key, shape)

    def euler(x, flow, step):
        s, s_next, _ = step
        return x + (s_next - s) * flow

    follow = few_step if sampler.method == "few_step" else euler

    def body(state, step):
        x, carry = state
        flow, carry = flow_fn(x, step[0], carry)
        return (follow(x, flow, step), carry), None

    steps = (jnp.asarray(levels), jnp.asarray(following), jnp.stack(fresh))
    return jax.lax.scan(body, (draw_noise(first, shape), carry), steps)[0]
