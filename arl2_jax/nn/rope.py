"""Rotary position embeddings, computed for any position without a table."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

THETA = 10000.0


class Rope(NamedTuple):
    """Cosines and sines of the rotary embedding, each [tokens, head_dim / 2] float32."""

    cos: Float[Array, "n pairs"]
    sin: Float[Array, "n pairs"]


def rope_angles(positions: Int[Array, "n"], width: int) -> Float[Array, "n pairs"]:
    """Return the angles of one axis, position * 10000^(-2 i / width), reduced to [-pi, pi).

    Frequencies are 64-bit fractions of a turn. The product with the position wraps around in
    integer arithmetic, so large positions lose no accuracy: the error stays near 2e-7 radians up to
    position 2^31.

    Args:
      positions: whole positions, not negative.
      width: features of the axis; width / 2 pairs are rotated.
    """
    turns = [THETA ** (-2 * i / width) / (2 * math.pi) for i in range(width // 2)]
    fractions = [int(t * 2**64) for t in turns]
    high = jnp.asarray([f >> 32 for f in fractions], jnp.uint32)
    low = jnp.asarray([(f & (2**32 - 1)) / 2**32 for f in fractions], jnp.float32)
    place = positions.astype(jnp.uint32)[:, None]
    phase = place * high + (place.astype(jnp.float32) * low).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(phase, jnp.int32) * np.float32(2 * math.pi / 2**32)


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Return the features of a head that rotate with time, row and column (44, 42, 42 of 128)."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def video_rope(
    first_frame, frames: int, rows: int, columns: int, head_dim: int, *, space: bool = True
) -> Rope:
    """Return the rotary embedding of a run of latent frames, tokens in (frame, row, column) order.

    Args:
      first_frame: position of the first frame, int32 scalar, may be traced.
      frames, rows, columns: size of the token grid.
      head_dim: width of a head, any even number of at least 6.
      space: whether rows and columns rotate, or time alone.
    """
    time, row, column = axis_widths(head_dim)
    grid = (frames, rows, columns)
    t = rope_angles(first_frame + jnp.arange(frames), time)[:, None, None]
    r = rope_angles(space * jnp.arange(rows), row)[None, :, None]
    c = rope_angles(space * jnp.arange(columns), column)[None, None]
    parts = [jnp.broadcast_to(angles, (*grid, angles.shape[-1])) for angles in (t, r, c)]
    angles = jnp.concatenate(parts, axis=-1).reshape(frames * rows * columns, head_dim // 2)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def sequence_rope(first: int | Int[Array, ""], length: int, head_dim: int) -> Rope:
    """Return the rotary embedding of a one-dimensional sequence that starts at `first`."""
    angles = rope_angles(first + jnp.arange(length), head_dim)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def rotate(x: Float[Array, "*batch n h d"], rope: Rope | None) -> Float[Array, "*batch n h d"]:
    """Rotate the interleaved pairs (2i, 2i + 1) of every head in float32; with None, return x."""
    if rope is None:
        return x
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    cos = rope.cos[:, None, :, None]
    sin = jnp.stack([-rope.sin, rope.sin], axis=-1)[:, None]
    return (pairs * cos + pairs[..., ::-1] * sin).reshape(x.shape).astype(x.dtype)
