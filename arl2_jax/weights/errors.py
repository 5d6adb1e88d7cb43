"""How unusable weights are reported."""

from arl2_jax.config import ConfigError


class WeightsError(ConfigError):
    """Weights that are missing, cannot be read, or belong to another model."""
