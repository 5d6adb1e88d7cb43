"""A codec without weights: squares of pixels become channels."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from arl2_jax.codecs.interface import Array
from arl2_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class SpaceToDepth:
    """Lossless codec: each square of pixels becomes the channels of one latent.

    With more channels than the 3 * factor^2 values of a square, the values are lifted by a fixed
    matrix Q with orthonormal rows (z Q, undone by Q^T), which preserves all distances. A latent
    frame is a pixel frame. Works on numpy and jax arrays, also under `jax.jit`.

    Attributes:
      spatial_factor: side of the square in pixels.
      channels: channels of a latent, at least 3 * spatial_factor^2.

    Raises:
      ConfigError: fewer channels than a square has values.
    """

    spatial_factor: int
    channels: int

    def __post_init__(self):
        if self.channels < self.values:
            raise ConfigError(
                f"gives {self.values} values per latent, more than model.in_dim={self.channels}",
                field="data.codec_factor",
                value=self.spatial_factor,
                remedy="lower the factor or raise model.in_dim",
            )

    @property
    def values(self) -> int:
        """Number of color values in one square."""
        return 3 * self.spatial_factor**2

    def pixel_frames(self, latent_frames: int) -> int:
        """Return the same number: time is not compressed."""
        return latent_frames

    def latent_frames(self, pixel_frames: int) -> int:
        """Return the same number: time is not compressed."""
        return pixel_frames

    def encode(self, pixels: Array) -> Array:
        """Encode pixels [B, F, H, W, 3], float in [-1, 1], as latents [B, F, h, w, C]."""
        p = self.spatial_factor
        latents = rearrange(pixels, "b f (h p) (w q) c -> b f h w (p q c)", p=p, q=p)
        return latents if self.channels == self.values else _matmul(latents, self._lift())

    def decode(self, latents: Array) -> Array:
        """Decode latents [B, F, h, w, C] to pixels [B, F, H, W, 3]."""
        if self.channels != self.values:
            latents = _matmul(latents, self._lift().T)
        p = self.spatial_factor
        return rearrange(latents, "b f h w (p q c) -> b f (h p) (w q) c", p=p, q=p)

    def init_state(self, batch: int, rows: int, columns: int) -> tuple[()]:
        """Return an empty state: frames are decoded independently."""
        del batch, rows, columns
        return ()

    def decode_block(
        self, latents: Array, state: tuple[()], *, first: bool
    ) -> tuple[Array, tuple[()]]:
        """Decode a block as `decode` does; the state stays empty."""
        del first
        return self.decode(latents), state

    def _lift(self) -> np.ndarray:
        """Return Q [values, channels]: the first rows of the orthonormal cosine transform."""
        row, column = np.ogrid[: self.values, : self.channels]
        q = np.cos(np.pi * row * (column + 0.5) / self.channels) * np.sqrt(2 / self.channels)
        q[0] /= np.sqrt(2)
        return q


def _matmul(x: Array, matrix: np.ndarray) -> Array:
    """Multiply in the type of x, at full precision even if the default is lower (TPU)."""
    if isinstance(x, np.ndarray):
        return x @ matrix.astype(x.dtype)
    return jnp.matmul(x, jnp.asarray(matrix, x.dtype), precision="highest")
