"""What a codec does: pixels become the latents that the model denoises, and back."""

from typing import Any, Protocol

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
