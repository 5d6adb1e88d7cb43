"""Codecs: what turns pixels into the latents that the model denoises, and back."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from arl2_jax.config import Config, ConfigError
from arl2_jax.models.vae import WanCodec
from arl2_jax.weights import find_release, load_vae, vae_config

Array = Any  # numpy or jax, traced or not


class Codec(Protocol):
    """A map between pixel frames and latent frames, causal in time."""

    @property
    def spatial_factor(self) -> int:
        """Rows and columns of pixels that make one latent."""
        ...

    @property
    def channels(self) -> int:
        """Channels C of a latent."""
        ...

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames that `latent_frames` latent frames decode to."""
        ...

    def latent_frames(self, pixel_frames: int) -> int:
        """Latent frames that `pixel_frames` pixel frames encode to."""
        ...

    def encode(self, pixels: Array) -> Array:
        """Encodes pixels [B, F, H, W, 3], float in [-1, 1], as latents [B, T, h, w, C]."""
        ...

    def decode(self, latents: Array) -> Array:
        """Decodes latents [B, T, h, w, C] to pixels [B, F, H, W, 3]."""
        ...

    def init_state(self, batch: int, rows: int, columns: int) -> Any:
        """What `decode_block` knows before the first block of `rows` x `columns` latents."""
        ...

    def decode_block(self, latents: Array, state: Any, *, first: bool) -> tuple[Array, Any]:
        """Decodes the next frames of a video: (pixels [B, F, H, W, 3], state).

        All blocks in turn give the frames that `decode` gives of the whole.

        Args:
          latents: [B, f, h, w, C].
          state: of `init_state`, or as the block before has left it.
          first: whether the video begins with this block.
        """
        ...


@dataclasses.dataclass(frozen=True)
class SpaceToDepth:
    """Moves each square of pixels into the channels of one latent; nothing is lost.

    With more channels than the 3 * factor^2 values of a square, the values are lifted by a fixed
    matrix Q with orthonormal rows (z Q, undone by Q^T), which keeps all distances. A latent frame
    is a pixel frame. Works on numpy and jax arrays, also under `jax.jit`.

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
                f"data.codec_factor={self.spatial_factor} gives {self.values} values a latent, "
                f"more than model.in_dim={self.channels}; lower the factor or raise model.in_dim"
            )

    @property
    def values(self) -> int:
        """Colour values in one square."""
        return 3 * self.spatial_factor**2

    def pixel_frames(self, latent_frames: int) -> int:
        """The same number: time is not compressed."""
        return latent_frames

    def latent_frames(self, pixel_frames: int) -> int:
        """The same number: time is not compressed."""
        return pixel_frames

    def encode(self, pixels: Array) -> Array:
        """Encodes pixels [B, F, H, W, 3], float in [-1, 1], as latents [B, F, h, w, C]."""
        p = self.spatial_factor
        latents = rearrange(pixels, "b f (h p) (w q) c -> b f h w (p q c)", p=p, q=p)
        return latents if self.channels == self.values else _matmul(latents, self._lift())

    def decode(self, latents: Array) -> Array:
        """Decodes latents [B, F, h, w, C] to pixels [B, F, H, W, 3]."""
        if self.channels != self.values:
            latents = _matmul(latents, self._lift().T)
        p = self.spatial_factor
        return rearrange(latents, "b f h w (p q c) -> b f (h p) (w q) c", p=p, q=p)

    def init_state(self, batch: int, rows: int, columns: int) -> tuple[()]:
        """Nothing: frames are decoded one by one."""
        del batch, rows, columns
        return ()

    def decode_block(
        self, latents: Array, state: tuple[()], *, first: bool
    ) -> tuple[Array, tuple[()]]:
        """Decodes a block like any other."""
        del first
        return self.decode(latents), state

    def _lift(self) -> np.ndarray:
        """Q [values, channels]: the first rows of the orthonormal cosine transform."""
        row, column = np.ogrid[: self.values, : self.channels]
        q = np.cos(np.pi * row * (column + 0.5) / self.channels) * np.sqrt(2 / self.channels)
        q[0] /= np.sqrt(2)
        return q


def make_codec(config: Config) -> Codec | None:
    """The codec that `config.data.codec` names, for the channels of `config.model`.

    Returns:
      The codec; None for Wan's autoencoder if `config.data.vae` names no weights, without which
      stored latents can be trained on, but not be shown.

    Raises:
      ConfigError: the codec does not fit the model, or its weights cannot be read.
    """
    model, data = config.model, config.data
    if model.in_dim != model.out_dim:
        raise ConfigError(
            f"model.out_dim={model.out_dim} must equal model.in_dim={model.in_dim}: the codec "
            "decodes what the model puts out"
        )
    if data.codec == "space_to_depth":
        return SpaceToDepth(data.codec_factor, model.in_dim)
    if not data.vae:
        return None
    codec = load_wan_codec(data.vae)
    for field, value, wanted in (
        ("data.codec_factor", data.codec_factor, codec.spatial_factor),
        ("model.in_dim", model.in_dim, codec.channels),
    ):
        if value != wanted:
            raise ConfigError(f"{field}={value} must be {wanted}, that of data.vae={data.vae}")
    return codec


def vae_weights(path: str) -> str:
    """The file or folder of the autoencoder's weights: in a release's folder, or `path` itself."""
    return str(find_release(path).vae or path)


def load_wan_codec(
    path: str, dtype: str | None = None, tile: tuple[int, int] | None = None
) -> WanCodec:
    """Wan's autoencoder with the weights of a file or folder, on the default device.

    Args:
      path: weights in any layout that `arl2_jax.weights` reads, or a release with them.
      dtype: type of the convolutions; by default bfloat16, on CPUs float32.
      tile: rows and columns of latents that are computed together; by default all.

    Raises:
      WeightsError: the weights cannot be read, or are of another network.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    weights = vae_weights(path)
    cfg = dataclasses.replace(vae_config(weights), dtype=dtype)
    return WanCodec(load_vae(weights, cfg), cfg, tile)


def _matmul(x: Array, matrix: np.ndarray) -> Array:
    """X times matrix in x's type, at full precision also where the default is lower (TPU)."""
    if isinstance(x, np.ndarray):
        return x @ matrix.astype(x.dtype)
    return jnp.matmul(x, jnp.asarray(matrix, x.dtype), precision="highest")
