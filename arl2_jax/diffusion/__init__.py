"""Flow matching and its samplers, for any function that predicts the flow."""

from arl2_jax.diffusion.flow_matching import (
    add_noise,
    draw_levels,
    draw_noise,
    per_frame,
    predict_x0,
    shift_noise_levels,
)
from arl2_jax.diffusion.samplers import noise_levels, sample, sample_carrying

__all__ = [
    "add_noise",
    "draw_levels",
    "draw_noise",
    "noise_levels",
    "per_frame",
    "predict_x0",
    "sample",
    "sample_carrying",
    "shift_noise_levels",
]
