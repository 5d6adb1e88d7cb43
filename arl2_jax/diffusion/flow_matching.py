"""Flow matching: the straight path between data and noise.

x_s = (1 - s) x0 + s eps at noise level s in [0, 1]; the network predicts the flow
v = eps - x0 and gets the timestep 1000 s. Source: arXiv 2210.02747, 2209.03003.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def shift_noise_levels(s, shift: float):
    """Move noise levels towards noise: shift s / (1 + (shift - 1) s)."""
    return shift * s / (1 + (shift - 1) * s)


def per_frame(s: Float[Array, "b t"]) -> Float[Array, "b t 1 1 1"]:
    """Reshape noise levels of frames, so that they multiply latents."""
    return s[..., None, None, None]


def add_noise(x0, eps, s: Float[Array, "b t"]):
    """Return x_s of latents [B, T, rows, columns, channels]."""
    return (1 - per_frame(s)) * x0 + per_frame(s) * eps


def predict_x0(x, flow, s: Float[Array, "b t"]):
    """Return the clean latents that a predicted flow implies."""
    return x - per_frame(s) * flow


def draw_noise(key: Array, shape: tuple[int, ...]) -> Array:
    """Draw standard normal noise, float32.

    The noise is drawn flat: the numbers are the same, and XLA compiles the draw in a thirtieth of
    the time that it needs for five axes.
    """
    return jax.random.normal(key, (math.prod(shape),)).reshape(shape)


def draw_levels(key: Array, batch: int, blocks: int, frames_per_block: int, shift: float):
    """Draw noise levels [B, T]: independent and uniform for each block, then shifted."""
    s = shift_noise_levels(jax.random.uniform(key, (batch, blocks)), shift)
    return jnp.repeat(s, frames_per_block, axis=1)
