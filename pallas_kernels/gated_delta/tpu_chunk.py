"""What both TPU kernels do with a chunk: where it lies, how it is read, products and the inverse."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta.plan import Plan

# Heads of one grid step at head dims of 128: independent work enough to hide every latency.
_HEADS = 12


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


def product(x: Pieces, y: Pieces, contract: tuple[int, int] = (1, 0)) -> Array:
    """x @ y over the contracted axes, in float32, without products of small pieces."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    count = max(len(x), len(y))
    exact = lax.Precision.HIGHEST if x[0].dtype == jnp.float32 else None
    return sum(
        lax.dot_general(x[i], y[j], dims, precision=exact, preferred_element_type=jnp.float32)
        for i in reversed(range(len(x)))
        for j in reversed(range(len(y)))
        if i + j < count
    )  # pyright: ignore[reportReturnType]


@dataclasses.dataclass
class Chunk:
    """Tokens of one grid step; rows past the end of the block are zero: the identity."""

    k: Sequence[Array]  # [C, K] a head
    v: Sequence[Array]  # [C, V] a head
    beta: Array  # [C, heads]
    r: Array  # [C, heads]: the decay of what a token writes, until the end of the chunk
    gamma: Array  # [1, heads]: the decay of the state


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

    decay = masked(g[...])
    # Suffix sums, never differences of sums, which a reset of -1e4 would swallow.
    after = triangle(size, below=False).astype(jnp.float32)
    later = product((after,), (decay,))
    gamma = jnp.exp(later[:1] + decay[:1])
    return Chunk(
        heads(k, tiling.key_dim), heads(v, tiling.value_dim), masked(beta[...]), jnp.exp(later), gamma
    )


def triangle(size: int, *, below: bool) -> Array:
    """True strictly below the diagonal, or strictly above."""
    i, j = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return i > j if below else i < j


def inverses(numerics: Numerics, ms: Sequence[Array]) -> list[Array]:
    """(I + L)^-1 of every head, L the strictly lower part of m: X <- X - X L_b X, b = 1, 2, 4, ...

    X holds the inverses of the diagonal blocks of size b, L_b what joins two of them: bounded for
    any keys, where powers of L lose all digits. All heads climb a level together: their products
    do not wait for each other.
    """
    size = ms[0].shape[0]
    i, j = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))

    def joining(m: Array, level: int) -> Array:
        row, column = i >> level, j >> level
        return jnp.where((row == column + 1) & (row & 1 == 1), m, 0.0)

    xs = [jnp.where(i == j, 1.0, 0.0) - joining(m, 0) for m in ms]
    for level in range(1, size.bit_length() - 1):
        xs = _climb(numerics, xs, [joining(m, level) for m in ms], 2**level)
    return xs


def _climb(numerics: Numerics, xs: list[Array], ls: list[Array], b: int) -> list[Array]:
    """One level. From b = 8 on only the rows that change, whole tiles of registers, take part."""
    size = xs[0].shape[0]
    starts = range(0, size, b)

    def split(x: Array) -> Pieces:
        return pieces(x, numerics.inverse)

    lows = xs
    if b >= 8:
        lows = [jnp.concatenate([x[s : s + b] for s in starts[1::2]]) for x in xs]
    ups = [product(split(x), split(m)) for x, m in zip(lows, ls, strict=True)]
    ups = [product(split(up), split(x)) for up, x in zip(ups, xs, strict=True)]
    lows = [x - up for x, up in zip(lows, ups, strict=True)]
    if b < 8:
        return lows
    return [
        jnp.concatenate(
            [
                x[s : s + b] if n % 2 == 0 else low[n // 2 * b : (n // 2 + 1) * b]
                for n, s in enumerate(starts)
            ]
        )
        for x, low in zip(xs, lows, strict=True)
    ]


def block_spec(shape: tuple[int | None, ...], index: Any) -> pl.BlockSpec:
    return pl.BlockSpec(shape, index)


def varying(shape: tuple[int, ...], dtype: Any, like: Array) -> jax.ShapeDtypeStruct:
    """An output that varies over a device mesh as `like` does."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(like).mat)
