"""The inverse of a unit triangular matrix of 64 rows, inside a kernel.

Two diagonal blocks of 32 rows by substitution, one column a thread, and the block beside them by
two products in three bfloat16 passes each: no intermediate is larger than an entry of the result
times an entry of the matrix, for any keys. Powers of the matrix, as in Neumann doubling, would not
be bounded where keys are correlated.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, math, memref, vector

from pallas_kernels.gated_delta.gpu.tiles import (
    CHUNK,
    WGMMA,
    bf16,
    f32,
    iota,
    load,
    product,
    split,
    store,
    tiles,
)

HALF = CHUNK // 2
_PAD = 8  # columns that spread the rows of a float32 matrix over the banks of shared memory


class Scratch(NamedTuple):
    """Shared memory of one inverse."""

    matrix: Any  # float32, for the substitution
    beside: tuple[Any, Any]  # high and low part of the half of the columns with the block beside
    diagonal: Any  # float32: inverses of both diagonal blocks, one above the other
    factor: tuple[Any, Any]  # their high and low part


def scratch() -> Scratch:
    """The shared memory that `unit_inverse` needs."""
    half = lambda: plgpu.SMEM((CHUNK, HALF), bf16, transforms=tiles(HALF))
    return Scratch(
        plgpu.SMEM((CHUNK, CHUNK + _PAD), f32),
        (half(), half()),
        plgpu.SMEM((CHUNK, HALF + _PAD), f32),
        (half(), half()),
    )


def unit_inverse(m: Array, s: Scratch, *, upper: bool, interpret: Any) -> tuple[Array, Array]:
    """The left and the right half of (I + strict triangle of m)^-1, each [64, 32] float32.

    What m holds outside its strict upper (or lower) triangle must be finite and is not used.
    """
    store(s.matrix.at[:, :CHUNK], m)
    beside = m[:, HALF:] if upper else m[:, :HALF]
    s.beside[0][...], s.beside[1][...] = split(beside)
    plgpu.commit_smem()
    (_substitute_interpreted if interpret else _substitute)(s.matrix, s.diagonal, upper)
    plgpu.commit_smem()
    diagonal = load(s.diagonal.at[:, :HALF], WGMMA, optimized=False)
    high, low = split(diagonal)
    s.factor[0][...], s.factor[1][...] = high, low
    plgpu.commit_smem()

    # With blocks D1, D2 on the diagonal and B beside them: -D1 B D2 above, or -D2 B D1 below.
    here, there = pl.ds(0, HALF), pl.ds(HALF, HALF)
    outer, inner = (here, there) if upper else (there, here)
    b_high, b_low = (ref.at[outer] for ref in s.beside)
    d_high, d_low = (ref.at[inner] for ref in s.factor)
    left, _ = product((low, b_high), (high, b_low), (high, b_high), interpret=interpret)
    l_high, l_low = split(left)
    block, _ = product((l_low, d_high), (l_high, d_low), (l_high, d_high), interpret=interpret)

    top = iota(CHUNK, HALF, 0) < HALF
    nothing = jnp.zeros_like(diagonal)
    if upper:
        return jnp.where(top, diagonal, nothing), jnp.where(top, -block, diagonal)
    return jnp.where(top, diagonal, -block), jnp.where(top, nothing, diagonal)


def _substitute(matrix: Any, diagonal: Any, upper: bool) -> None:
    """Inverses of both diagonal blocks; thread t of the first 64 makes column t % 32 of t / 32."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType()))
    def substitute(_: Any, matrix: Any, diagonal: Any) -> None:
        index, word = ir.IndexType.get(), ir.F32Type.get()
        four = ir.VectorType.get((4,), word)
        const = lambda n: arith.constant(index, n)
        number = arith.index_cast(index, utils.thread_idx())
        thread = arith.remui(number, const(2 * CHUNK))
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, thread, const(CHUNK))):
            column = arith.remui(thread, const(HALF))
            base = arith.subi(thread, column)
            zero, one = (arith.constant(word, x) for x in (0.0, 1.0))
            minus: dict[int, Any] = {}  # the column's entries so far, negated
            for i in reversed(range(HALF)) if upper else range(HALF):
                row = arith.addi(base, const(i))
                on_diagonal = arith.cmpi(arith.CmpIPredicate.eq, column, const(i))
                # Four sums, so that additions need not wait for each other.
                sums = [arith.select(on_diagonal, one, zero), zero, zero, zero]
                for start in range(0, HALF, 4):
                    inside = [j for j in range(start, start + 4) if j in minus]
                    if not inside:
                        continue
                    entries = vector.load(four, matrix, [row, arith.addi(base, const(start))])
                    for j in inside:
                        entry = vector.extract(entries, [], [j - start])
                        sums[j % 4] = math.fma(entry, minus[j], sums[j % 4])
                entry = arith.addf(arith.addf(*sums[:2]), arith.addf(*sums[2:]))
                memref.store(entry, diagonal, [row, column])
                minus[i] = arith.negf(entry)

    substitute(matrix, diagonal)  # pyright: ignore[reportCallIssue]


def _substitute_interpreted(matrix: Any, diagonal: Any, upper: bool) -> None:
    """The same for Pallas's interpreter, which runs no inlined code."""
    m = matrix[:, :CHUNK]
    for start in (0, HALF):
        block = m[start : start + HALF, start : start + HALF]
        strict = jnp.triu(block, 1) if upper else jnp.tril(block, -1)
        x = jnp.eye(HALF, dtype=f32)
        order = reversed(range(HALF)) if upper else range(HALF)
        for i in order:
            x = x.at[i].add(-strict[i] @ x)
        diagonal[start : start + HALF, :HALF] = x
