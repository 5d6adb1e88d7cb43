"""Released weights as our parameters."""

from arl2_jax.weights.errors import WeightsError
from arl2_jax.weights.load import load_params

__all__ = ["WeightsError", "load_params"]
