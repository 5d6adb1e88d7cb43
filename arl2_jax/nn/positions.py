"""Positions of tokens in a video or in a sequence."""

import dataclasses
from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int

from arl2_jax.nn.rope import Rope, sequence_rope, video_rope

_static: Any = lambda: dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenGrid:
    """Positions of the tokens of a block or of a clip, in (frame, row, column) order.

    A sequence without rows and columns is a grid whose frames have one token each.

    Attributes:
      start: index of the first frame, int32 scalar, may be traced; None if unknown.
      absolute: rotations of all tokens by their absolute positions; None without rotations.
      frames, rows, columns: size of the grid.
      head_dim: width of a head.
      axes: how positions rotate a head: "video" splits its features between time, row and column;
        "sequence" uses all for the position; "given" has only the rotations in `absolute`.
      text: keys of the layer's cross-attention, [B, L, H, D]; None outside a model with text.
      layer: index in a run of layers with stacked states, int32 scalar; None if the state is that
        of one layer.
    """

    start: int | Int[Array, ""] | None
    absolute: Rope | None
    frames: int = _static()
    rows: int = _static()
    columns: int = _static()
    head_dim: int = _static()
    axes: Literal["video", "sequence", "given"] = _static()
    text: Float[Array, "texts l h d"] | None = None
    layer: Int[Array, ""] | None = None

    @property
    def first_frame(self) -> int | Int[Array, ""]:
        """Index of the first frame.

        Raises:
          ValueError: it is unknown.
        """
        if self.start is None:
            raise ValueError(
                "a memory that needs positions was given none; pass a sequence_grid or video_grid"
            )
        return self.start

    @property
    def tokens_per_frame(self) -> int:
        """Number of tokens in one frame."""
        return self.rows * self.columns

    @property
    def first_token(self) -> int | Int[Array, ""]:
        """Index of the first token."""
        return self.first_frame * self.tokens_per_frame

    def rotation(
        self, first_frame: int | Int[Array, ""] | None = None, *, space: bool = True
    ) -> Rope | None:
        """Return the rotations of the tokens, as if the first frame were at `first_frame`.

        Args:
          first_frame: position of the first frame, not negative; by default its own.
          space: whether rows and columns rotate, or time alone.

        Raises:
          ValueError: rotations were given, and others are requested.
        """
        if self.absolute is None or (first_frame is None and space):
            return self.absolute
        if self.axes == "given":
            raise ValueError("given rotations cannot be moved; pass a sequence_grid or video_grid")
        first = self.first_frame if first_frame is None else first_frame
        if self.axes == "sequence":
            return sequence_rope(first, self.frames, self.head_dim)
        return video_rope(first, self.frames, self.rows, self.columns, self.head_dim, space=space)

    def block(self, index: int | Int[Array, ""], blocks: int) -> "TokenGrid":
        """Return the grid of block `index`, if the frames are divided into `blocks` equal blocks.

        Raises:
          ValueError: `blocks` does not divide the frames.
        """
        frames, rest = divmod(self.frames, blocks)
        if rest:
            raise ValueError(f"{blocks} blocks must divide the {self.frames} frames of the grid")
        size = frames * self.tokens_per_frame
        slice_block = lambda x: jax.lax.dynamic_slice_in_dim(x, index * size, size)
        first = None if self.start is None else self.start + index * frames
        absolute = jax.tree.map(slice_block, self.absolute)
        return dataclasses.replace(self, start=first, absolute=absolute, frames=frames)


def video_grid(
    first_frame: int | Int[Array, ""], frames: int, rows: int, columns: int, head_dim: int
) -> TokenGrid:
    """Return the positions of a run of latent frames."""
    rope = video_rope(first_frame, frames, rows, columns, head_dim)
    return TokenGrid(first_frame, rope, frames, rows, columns, head_dim, "video")


def sequence_grid(first: int | Int[Array, ""], length: int, head_dim: int) -> TokenGrid:
    """Return the positions of a run of tokens in a sequence."""
    return TokenGrid(
        first, sequence_rope(first, length, head_dim), length, 1, 1, head_dim, "sequence"
    )


def given_rotations(
    rope: Rope | None, tokens: int, head_dim: int, *, start: int | None = None
) -> TokenGrid:
    """Return a grid of tokens with the caller's rotations, or with none."""
    return TokenGrid(start, rope, tokens, 1, 1, head_dim, "given")
