"""Flow matching and its samplers; knows functions, not networks."""

from arl2_jax.diffusion.flow_matching import (
    add_noise,
    draw_levels,
    draw_noise,
    per_frame,
    predict_x0,
    warp,
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
    "warp",
]
