"""The interface of codecs, which map pixels to the latents that a model denoises, and back."""

from typing import Any, Protocol, runtime_checkable

Array = Any  # numpy or jax, traced or not


@runtime_checkable
class Codec(Protocol):
    """A map between pixel frames and latent frames, causal in time."""

    @property
    def spatial_factor(self) -> int:
        """Pixels along each side of the square that one latent covers."""
        ...

    @property
    def channels(self) -> int:
        """Channels C of a latent."""
        ...

    def pixel_frames(self, latent_frames: int) -> int:
        """Return how many pixel frames `latent_frames` latent frames decode to."""
        ...

    def latent_frames(self, pixel_frames: int) -> int:
        """Return how many latent frames `pixel_frames` pixel frames encode to."""
        ...

    def encode(self, pixels: Array) -> Array:
        """Encode pixels [B, F, H, W, 3], float in [-1, 1], as latents [B, T, h, w, C]."""
        ...

    def decode(self, latents: Array) -> Array:
        """Decode latents [B, T, h, w, C] to pixels [B, F, H, W, 3]."""
        ...

    def init_state(self, batch: int, rows: int, columns: int) -> Any:
        """Return the state before the first block of `rows` x `columns` latents."""
        ...

    def decode_block(self, latents: Array, state: Any, *, first: bool) -> tuple[Array, Any]:
        """Decode the next frames of a video: (pixels [B, F, H, W, 3], state).

        Block by block, the frames are the same as those of `decode` for the whole video.

        Args:
          latents: [B, f, h, w, C].
          state: from `init_state` or the previous block.
          first: whether the video begins with this block.
        """
        ...
