"""Operations on a chunk for both TPU kernels: reading, matrix products, the inverse."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.gated_delta.plan import Plan
from pallas_kernels.gated_delta.tpu_layout import Layout

# Diagonal blocks inverted by forward substitution; larger ones by matrix products.
_BASE = 16


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Number of bfloat16 pieces that represent a float32 operand; 0 multiplies in float32.

    Two pieces are three passes (bf16x3), three are six. `wide` is for T and for sums over tokens
    that cancel where keys are similar, with rounding errors up to 30 times those of `narrow` sums.
    """

    narrow: int
    wide: int

    @classmethod
    def of(cls, plan: Plan, k: Array) -> "Numerics":
        """Return the numerics of a call with keys k."""
        if k.dtype == jnp.float32:
            return cls(0, 0)
        return cls(1, 2) if plan.operand == jnp.bfloat16 else cls(2, 3)


Pieces = tuple[Array, ...]


def pieces(x: Array, count: int) -> Pieces:
    """Split x into summands that the matrix unit multiplies without rounding."""
    if x.dtype == jnp.bfloat16 or count == 0:
        return (x,)
    parts = []
    for _ in range(count):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return tuple(parts)


def product(x: Pieces, y: Pieces, contract: int = 0) -> Array:
    """Return float32 x @ y, or x @ y^T with contract = 1; products of two small pieces are omitted.

    Pieces of x that meet the same piece of y are stacked: the matrix unit loads y once.
    """
    dims = (((1,), (contract,)), ((), ()))
    exact = lax.Precision.HIGHEST if y[0].dtype == jnp.float32 else None
    rows, count = x[0].shape[0], max(len(x), len(y))
    terms = []
    for j, piece in enumerate(y):
        stack = x[: count - j]
        left = stack[0] if len(stack) == 1 else jnp.concatenate(stack)
        out = lax.dot_general(
            left, piece, dims, precision=exact, preferred_element_type=jnp.float32
        )
        terms += [out[i * rows : (i + 1) * rows] for i in range(len(stack))]
    return functools.reduce(jnp.add, reversed(terms))


@dataclasses.dataclass
class Chunk:
    """Tokens of one grid step; rows past the end of the block are zero, which is the identity."""

    k: Sequence[Array]  # [C, K] per head
    v: Sequence[Array]  # [C, V] per head
    beta: Sequence[Array]  # [C, 1] per head
    r: Sequence[Array]  # [C, 1] per head: decay of a token's write until the end of the chunk
    gamma: Sequence[Array]  # [1, 1] per head: decay of the state


def read_chunk(layout: Layout, k: Any, v: Any, g: Any, beta: Any) -> Chunk:
    """Read the chunk of a grid step from references to k, v, g and beta."""
    size, group = layout.chunk, range(layout.group)
    rest = layout.block_size - layout.position()[1] * size

    def masked(x: Array) -> Array:
        if layout.block_size % size == 0:
            return x
        row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(row < rest, x, jnp.zeros_like(x))

    def heads(ref: Any, dim: int) -> list[Array]:
        return [masked(ref[:, h * dim : (h + 1) * dim]) for h in group]

    def columns(x: Array) -> list[Array]:
        return [x[:, h : h + 1] for h in group]

    decay = masked(g[...])
    # Suffix sums, never differences of sums, in which a reset of -1e4 would absorb the rest.
    later = product((strictly_lower(size).astype(jnp.float32).T,), (decay,))
    return Chunk(
        heads(k, layout.key_dim),
        heads(v, layout.value_dim),
        columns(masked(beta[...])),
        columns(jnp.exp(later)),
        columns(jnp.exp(later[:1] + decay[:1])),
    )


def strictly_lower(size: int) -> Array:
    """Return a mask that is true below the diagonal."""
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return row > column


def inverses(numerics: Numerics, ms: Sequence[Array]) -> list[Array]:
    """Return (I + L)^-1 of every head, L strictly lower m, by X <- X - X L_b X, b = 16, 32, ...

    X holds the inverses of the diagonal blocks of size b, and L_b the blocks that join two of them.
    Entries are bounded for any keys, where powers of L lose all digits. A level is computed for
    all heads together, because their products do not depend on each other.
    """
    size = ms[0].shape[0]
    ls = [jnp.where(strictly_lower(size), m, 0.0) for m in ms]
    xs = _diagonal_inverses(numerics, ls)
    b = _BASE
    while b < size:
        xs = _join_blocks(numerics, xs, ls, b)
        b *= 2
    return xs


def _diagonal_inverses(numerics: Numerics, ls: Sequence[Array]) -> list[Array]:
    """Invert the 16 x 16 blocks on the diagonals by forward substitution.

    The blocks of a head lie side by side, [heads, 16, lanes], so that their rows s form one row.
    """
    size, heads, lanes = ls[0].shape[0], len(ls), 128
    row, lane = (lax.broadcasted_iota(jnp.int32, (size, lanes), axis) for axis in (0, 1))
    first, column = lane & -_BASE, lane & (_BASE - 1)  # of a lane's block, and within it
    tops, own = range(0, size, _BASE), first[:_BASE, :size]

    def side_by_side(m: Array) -> Array:
        blocks = [jnp.where(own == top, m[top : top + _BASE], 0.0) for top in tops]
        return functools.reduce(jnp.add, blocks)

    sides = pieces(jnp.concatenate([side_by_side(m) for m in ls]), numerics.wide)
    x = jnp.where(row == column, 1.0, 0.0)[:_BASE]
    x = jnp.broadcast_to(x, (heads, _BASE, lanes))
    for s in range(_BASE - 1):
        # Column s of every block, in all lanes of its block.
        select = jnp.where(row == first + s, 1.0, 0.0).astype(sides[0].dtype)
        x -= product(sides, (select,)).reshape(heads, _BASE, lanes) * x[:, s : s + 1]
    return [
        jnp.concatenate([jnp.where(own == top, x[h, :, :size], 0.0) for top in tops])
        for h in range(heads)
    ]


def _join_blocks(numerics: Numerics, xs: list[Array], ls: Sequence[Array], b: int) -> list[Array]:
    """Compute one level of `inverses`, only for rows that change: the odd blocks of b rows."""
    size = xs[0].shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    joining = (row & -b == (column & -b) + b) & (row & b == b)

    def odd(x: Array) -> Array:
        return jnp.concatenate([x[s : s + b] for s in range(b, size, 2 * b)])

    def merged(x: Array, up: Array) -> Array:
        low = odd(x) - up
        halves = [(x[2 * s : 2 * s + b], low[s : s + b]) for s in range(0, size // 2, b)]
        return jnp.concatenate([half for pair in halves for half in pair])

    splits = [pieces(x, numerics.wide) for x in xs]
    joins = [pieces(jnp.where(joining, m, 0.0), numerics.wide) for m in ls]
    ups = [
        product(tuple(odd(x) for x in split), join)
        for split, join in zip(splits, joins, strict=True)
    ]
    ups = [product(pieces(up, numerics.wide), x) for up, x in zip(ups, splits, strict=True)]
    return [merged(x, up) for x, up in zip(xs, ups, strict=True)]
