"""Stored latents for training, from the teacher's rollouts or from videos."""

from arl2_jax.preparation.describe import describe
from arl2_jax.preparation.rollouts import store_rollouts
from arl2_jax.preparation.videos import store_videos

__all__ = ["describe", "store_rollouts", "store_videos"]
