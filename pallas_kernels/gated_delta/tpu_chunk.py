"""What both TPU kernels do with a chunk: where it lies, how it is read, products and the inverse."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta.plan import Plan

# Heads of one grid step at head dims of 128: independent work enough to hide every latency.
_HEADS = 12

# Diagonal blocks inverted by forward substitution; larger ones by matrix products.
_BASE = 16


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of a call and of one grid step: `chunk` tokens of `group` heads."""

    batch: int
    blocks: int
    block_size: int
    heads: int
    key_dim: int
    value_dim: int
    chunk: int
    group: int

    @classmethod
    def of(cls, plan: Plan, k: Array, v: Array) -> "Tiling":
        """The tiling of k [B, T, H, K] and v [B, T, H, V]."""
        batch, time, heads, key_dim = k.shape
        value_dim = v.shape[-1]
        most = max(1, _HEADS * 128 * 128 // (key_dim * value_dim))
        group = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)
        blocks = time // plan.block_size
        chunk = plan.chunk_size or 128
        return cls(batch, blocks, plan.block_size, heads, key_dim, value_dim, chunk, group)

    @property
    def chunks(self) -> int:
        """Chunks of a block, the last of them perhaps ragged."""
        return -(-self.block_size // self.chunk)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """Batch entries, groups of heads, blocks, chunks; the state is carried over the last two."""
        return self.batch, self.heads // self.group, self.blocks, self.chunks

    def fold_features(self, x: Array) -> Array:
        """[B, T, H, D] -> [B, block, token, H D]: heads become lane blocks."""
        return x.reshape(self.batch, self.blocks, self.block_size, -1)

    def fold_heads(self, x: Array) -> Array:
        """[B, T, H] -> [B, group of heads, block, token, head]."""
        shape = (self.batch, self.blocks, self.block_size, -1, self.group)
        return jnp.moveaxis(x.reshape(shape), 3, 1)

    def unfold_heads(self, x: Array) -> Array:
        """The inverse of fold_heads."""
        return jnp.moveaxis(x, 1, 3).reshape(self.batch, -1, self.heads)


@dataclasses.dataclass(frozen=True)
class Numerics:
    """How many bfloat16 pieces stand for a float32 operand; 0 multiplies in float32.

    Two pieces are three passes (bf16x3), three are six. With alike keys T^T K cancels: T has more
    pieces than the rest.
    """

    operand: int
    inverse: int

    @classmethod
    def of(cls, plan: Plan, k: Array) -> "Numerics":
        """The numerics of a call with keys k."""
        if k.dtype == jnp.float32:
            return cls(0, 0)
        return cls(1, 2) if plan.operand == jnp.bfloat16 else cls(2, 3)


Pieces = tuple[Array, ...]


def pieces(x: Array, count: int) -> Pieces:
    """Summands of x, each of which the matrix unit takes as it is."""
    if x.dtype == jnp.bfloat16 or count == 0:
        return (x,)
    parts = []
    for _ in range(count):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return tuple(parts)


def product(x: Pieces, y: Pieces, contract: int = 0) -> Array:
    """x @ y, or x @ y^T with contract = 1, in float32; products of two small pieces are left out.

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
    """Tokens of one grid step; rows past the end of the block are zero: the identity."""

    k: Sequence[Array]  # [C, K] a head
    v: Sequence[Array]  # [C, V] a head
    beta: Sequence[Array]  # [C, 1] a head
    r: Sequence[Array]  # [C, 1] a head: the decay of what a token writes, until the chunk's end
    gamma: Sequence[Array]  # [1, 1] a head: the decay of the state


def read_chunk(tiling: Tiling, chunk: Any, k: Any, v: Any, g: Any, beta: Any) -> Chunk:
    """Reads chunk number `chunk` of a block from the step's references."""
    size, group = tiling.chunk, range(tiling.group)
    rest = tiling.block_size - chunk * size

    def masked(x: Array) -> Array:
        if tiling.block_size % size == 0:
            return x
        row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
        return jnp.where(row < rest, x, jnp.zeros_like(x))

    def heads(ref: Any, dim: int) -> list[Array]:
        return [masked(ref[:, h * dim : (h + 1) * dim]) for h in group]

    def columns(x: Array) -> list[Array]:
        return [x[:, h : h + 1] for h in group]

    decay = masked(g[...])
    # Suffix sums, never differences of sums, which a reset of -1e4 would swallow.
    later = triangle(size, below=False).astype(jnp.float32)
    later = product((later,), (decay,))
    return Chunk(
        heads(k, tiling.key_dim),
        heads(v, tiling.value_dim),
        columns(masked(beta[...])),
        columns(jnp.exp(later)),
        columns(jnp.exp(later[:1] + decay[:1])),
    )


def triangle(size: int, *, below: bool) -> Array:
    """True strictly below the diagonal, or strictly above."""
    i, j = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return i > j if below else i < j


def inverses(numerics: Numerics, ls: Sequence[Array]) -> list[Array]:
    """(I + L)^-1 of every head, L strictly lower: X <- X - X L_b X, b = 16, 32, ...

    X holds the inverses of the diagonal blocks of size b, L_b what joins two of them: bounded for
    any keys, where powers of L lose all digits. All heads climb a level together: their products
    do not wait for each other.
    """
    size = ls[0].shape[0]
    xs = _diagonal_inverses(numerics, ls)
    b = _BASE
    while b < size:
        xs = _climb(numerics, xs, ls, b)
        b *= 2
    return xs


def _diagonal_inverses(numerics: Numerics, ls: Sequence[Array]) -> list[Array]:
    """Inverses of the 16 x 16 blocks on the diagonals, by forward substitution.

    The blocks of a head lie side by side: row s of all of them is one row, [heads, 16, lanes].
    """
    size, heads, lanes = ls[0].shape[0], len(ls), 128
    row, lane = (lax.broadcasted_iota(jnp.int32, (size, lanes), axis) for axis in (0, 1))
    own = lane[:_BASE, :size] & -_BASE  # first column of the block that a lane belongs to
    tops = range(0, size, _BASE)
    side = jnp.concatenate(
        [
            functools.reduce(
                jnp.add, [jnp.where(own == top, l[top : top + _BASE], 0.0) for top in tops]
            )
            for l in ls
        ]
    )
    side = pieces(side, numerics.inverse)
    start = row - (lane & -_BASE)
    x = jnp.where(start[:_BASE] + (lane[:_BASE] & -_BASE) == (lane[:_BASE] & (_BASE - 1)), 1.0, 0.0)
    x = jnp.broadcast_to(x, (heads, _BASE, lanes))
    for u in range(_BASE - 1):
        # Column u of every block, in all lanes of the block.
        spread = jnp.where(start == u, 1.0, 0.0)
        spread = spread if numerics.inverse == 0 else spread.astype(jnp.bfloat16)
        column = product(side, (spread,)).reshape(heads, _BASE, lanes)
        x = x - column * x[:, u : u + 1]
    return [
        jnp.concatenate([jnp.where(own == top, x[h][:, :size], 0.0) for top in tops])
        for h in range(heads)
    ]


def _climb(numerics: Numerics, xs: list[Array], ls: Sequence[Array], b: int) -> list[Array]:
    """One level; only rows that change, the odd ones of the blocks of b, take part."""
    size = xs[0].shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    joining = (row & -b == (column & -b) + b) & (row & b == b)

    def odd(x: Array) -> Array:
        return jnp.concatenate([x[s : s + b] for s in range(b, size, 2 * b)])

    def merged(x: Array, up: Array) -> Array:
        low = odd(x) - up
        halves = [(x[2 * s : 2 * s + b], low[s : s + b]) for s in range(0, size // 2, b)]
        return jnp.concatenate([half for pair in halves for half in pair])

    splits = [pieces(x, numerics.inverse) for x in xs]
    joins = [pieces(jnp.where(joining, l, 0.0), numerics.inverse) for l in ls]
    ups = [
        product(tuple(odd(x) for x in split), join)
        for split, join in zip(splits, joins, strict=True)
    ]
    ups = [product(pieces(up, numerics.inverse), x) for up, x in zip(ups, splits, strict=True)]
    return [merged(x, up) for x, up in zip(xs, ups, strict=True)]


def varying(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """An output that varies over a device mesh as `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).mat)
