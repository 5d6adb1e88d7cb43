"""Released weights as our parameters."""

from arl2_jax.weights.load import load_params
from arl2_jax.weights.wan import WeightsError

__all__ = ["WeightsError", "load_params"]
