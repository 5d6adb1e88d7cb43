"""Wan's video autoencoder as a codec, with compiled functions."""

import dataclasses

import jax

from arl2_jax.config import VAEConfig
from arl2_jax.models.vae import clips, frames

_encode = jax.jit(clips.encode, static_argnums=1, static_argnames="tile")
_decode = jax.jit(clips.decode, static_argnums=1, static_argnames="tile")
_decode_block = jax.jit(
    clips.decode_block,
    static_argnums=1,
    static_argnames=("first", "tile"),
    donate_argnames="state",
)


@dataclasses.dataclass(frozen=True, eq=False)
class WanCodec:
    """A map between pixel frames and latent frames, causal in time.

    Each new shape is compiled once.

    Attributes:
      params: parameters, from `load_vae`; numpy arrays are put on the default device.
      cfg: autoencoder.
      tile: rows and columns of latents that are computed together; see `encode`.
    """

    params: frames.Params
    cfg: VAEConfig
    tile: tuple[int, int] | None = None

    def __post_init__(self):
        object.__setattr__(self, "params", jax.device_put(self.params))

    @property
    def spatial_factor(self) -> int:
        """Pixels along each side of the square that one latent covers."""
        return self.cfg.spatial_factor

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.cfg.z_dim

    def pixel_frames(self, latent_frames: int) -> int:
        """Return 1 for the first latent frame plus `cfg.temporal_factor` for every later one."""
        return max(1 + (latent_frames - 1) * self.cfg.temporal_factor, 0)

    def latent_frames(self, pixel_frames: int) -> int:
        """Return the number of whole latent frames; remaining pixel frames are not counted."""
        return 1 + (pixel_frames - 1) // self.cfg.temporal_factor

    def encode(self, pixels):
        """Encode pixels [B, F, H, W, 3], float in [-1, 1], as float32 latents [B, T, h, w, z]."""
        return _encode(self.params, self.cfg, pixels, tile=self.tile)

    def decode(self, latents):
        """Decode latents [B, T, h, w, z] to float32 pixels [B, F, H, W, 3] in [-1, 1]."""
        return _decode(self.params, self.cfg, latents, tile=self.tile)

    def init_state(self, batch: int, rows: int, columns: int) -> frames.State:
        """Return the decoder's state before the first block of `rows` x `columns` latents."""
        return frames.init_decoder_state(self.cfg, batch, rows, columns, tile=self.tile)

    def decode_block(self, latents, state: frames.State, *, first: bool):
        """Decode the next frames of a video.

        Block by block, the frames are the same as those of `decode` for the whole video.

        Args:
          latents: [B, f, h, w, z].
          state: from `init_state` or the previous block; its buffers are donated.
          first: whether the video begins with this block.

        Returns:
          Pixels (float32, in [-1, 1]), `pixel_frames(f)` of them if `first`, else
          f * cfg.temporal_factor; and the state for the next block.
        """
        return _decode_block(self.params, self.cfg, latents, state, first=first, tile=self.tile)
