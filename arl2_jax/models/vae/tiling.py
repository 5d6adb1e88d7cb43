"""Computation in overlapping spatial tiles, so that memory does not grow with the frame size."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Least part of a tile that overlaps with its neighbour.
OVERLAP = 1 / 4


class Tiles(NamedTuple):
    """Tiles of one size along one axis.

    Attributes:
      size: latents of a tile.
      starts: first latent of each tile, [n].
      weights: weight of each tile in the blended result, [n, size * scale].
    """

    size: int
    starts: np.ndarray
    weights: np.ndarray


def make_tiles(length: int, size: int, scale: int) -> Tiles:
    """Make evenly spaced tiles that cover an axis.

    The weight of a tile falls linearly to both of its ends, and at every position the weights are
    divided by their sum: where two tiles overlap, they are blended.

    Args:
      length: latents of the axis.
      size: latents of a tile, at most `length` of which are used.
      scale: positions of the result per latent.
    """
    size = min(size, length)
    stride = size - max(1, int(size * OVERLAP))
    count = 1 if size == length else 1 + math.ceil((length - size) / stride)
    starts = np.round(np.linspace(0, length - size, count)).astype(np.int32)
    tent = np.minimum(np.arange(size * scale), np.arange(size * scale)[::-1]) + 0.5
    total = np.zeros(length * scale)
    places = [slice(start * scale, (start + size) * scale) for start in starts]
    for place in places:
        total[place] += tent
    weights = np.stack([tent / total[place] for place in places])
    return Tiles(size, starts, weights.astype(np.float32))


def make_grid(
    height: int, width: int, tile: tuple[int, int], scale: int = 1
) -> tuple[Tiles, Tiles]:
    """Make tiles along rows and along columns.

    Args:
      height, width: latents of the frame.
      tile: rows and columns of latents in a tile, at least 2 x 2.
      scale: as in `make_tiles`.

    Raises:
      ValueError: the tile is too small.
    """
    if min(tile) < 2:
        raise ValueError(f"tile={tile} must be at least 2 x 2 latents, so that tiles overlap")
    return make_tiles(height, tile[0], scale), make_tiles(width, tile[1], scale)


def over_tiles(
    compute: Callable,
    x,
    states: Any,
    tile: tuple[int, int],
    *,
    source: int = 1,
    target: int = 1,
):
    """Compute x tile by tile and blend the results.

    Args:
      compute: (tile of x, state of the tile) -> (its result, the tile's new state).
      x: [B, F, h * source, w * source, C].
      states: pytree whose leaves have one entry for each tile, row by row; or ().
      tile: rows and columns of latents in a tile, at least 2 x 2.
      source, target: rows and columns of x, and of the result, per latent.

    Returns:
      The result, [B, F', h * target, w * target, C'], and the new states.

    Raises:
      ValueError: the tile is too small.
    """
    height, width = (length // source for length in x.shape[2:4])
    rows, columns = make_grid(height, width, tile, target)

    def part(row, column):
        strip = jax.lax.dynamic_slice_in_dim(x, row * source, rows.size * source, axis=2)
        return jax.lax.dynamic_slice_in_dim(strip, column * source, columns.size * source, axis=3)

    def add(picture, tile):
        (row, column, row_weights, column_weights), state = tile
        weights = row_weights[:, None, None] * column_weights[:, None]
        result, state = compute(part(row, column), state)
        result *= weights
        corner = (0, 0, row * target, column * target, 0)
        before = jax.lax.dynamic_slice(picture, corner, result.shape)
        return jax.lax.dynamic_update_slice(picture, before + result, corner), state

    state = jax.tree.map(lambda leaf: leaf[0], states)
    shape = jax.eval_shape(lambda: compute(part(0, 0), state)[0]).shape
    empty = jnp.zeros((*shape[:2], height * target, width * target, shape[-1]))
    i, j = (index.ravel() for index in np.indices((len(rows.starts), len(columns.starts))))
    places = (rows.starts[i], columns.starts[j], rows.weights[i], columns.weights[j])
    return jax.lax.scan(add, empty, (jax.tree.map(jnp.asarray, places), states))
