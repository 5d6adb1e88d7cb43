"""Wan's video autoencoder."""

import dataclasses
from typing import Any, Literal

from arl2_jax.config.rules import require

# Of the latents that Wan2.1's encoder makes, per channel.
_WAN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_WAN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Wan2.1's video autoencoder, causal in time; the defaults are the released one.

    Attributes:
      dim: channels at full resolution.
      dim_mult: channels of each level as multiples of `dim`; every level but the last halves rows
        and columns.
      num_res_blocks: residual blocks of a level (the decoder has one more).
      temporal_downsample: for every level but the last, whether it also halves the frames.
      z_dim: channels of a latent.
      latents_mean, latents_std: per channel; latents are normalised by them.
      dtype: type of the convolutions; norms and latents stay float32.
    """

    dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    z_dim: int = 16
    latents_mean: tuple[float, ...] = _WAN_MEAN
    latents_std: tuple[float, ...] = _WAN_STD
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self):
        for name in ("dim", "num_res_blocks", "z_dim"):
            value = getattr(self, name)
            require(value > 0, f"vae.{name}", value, "must be positive")
        require(
            len(self.temporal_downsample) == len(self.dim_mult) - 1,
            "vae.temporal_downsample",
            self.temporal_downsample,
            f"must have one entry fewer than vae.dim_mult={self.dim_mult}",
        )
        for name in ("latents_mean", "latents_std"):
            count = len(getattr(self, name))
            require(
                count == self.z_dim,
                f"vae.{name}",
                None,
                f"has {count} entries, not vae.z_dim={self.z_dim}",
            )
        require(min(self.latents_std) > 0, "vae.latents_std", self.latents_std, "must be positive")

    @property
    def spatial_factor(self) -> int:
        """Rows and columns of pixels per latent."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Pixel frames per latent frame, except for the first, which is one pixel frame."""
        return 2 ** sum(self.temporal_downsample)

    @classmethod
    def tiny(cls, **changes: Any) -> "VAEConfig":
        """Return an autoencoder for tests: the same strides, few channels."""
        z_dim = changes.get("z_dim", 4)
        values: dict[str, Any] = dict(
            dim=8, dim_mult=(1, 1, 2, 2), num_res_blocks=1, z_dim=z_dim, dtype="float32",
            latents_mean=_WAN_MEAN[:z_dim], latents_std=_WAN_STD[:z_dim],
        )  # fmt: skip
        return cls(**values | changes)
