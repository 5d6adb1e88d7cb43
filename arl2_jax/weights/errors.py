from arl2_jax.errors import WeightsError

__all__ = ["WeightsError"]
