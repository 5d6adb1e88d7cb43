"""The inverse of a unit upper triangular matrix of 64 rows, inside a kernel.

Two diagonal blocks of 32 rows are inverted by substitution, one column per thread, and the
off-diagonal block by two products in three float16 passes each. No intermediate is larger than an
entry of the result times an entry of the matrix, for any keys. Powers of the matrix, as in Neumann
doubling, would not be bounded where keys are correlated. Two float16 parts hold 22 bits, two
bfloat16 parts only 16: with identical keys that was an error of a tenth of the states after some
hundred tokens.
"""

from typing import Any

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
    f16,
    f32,
    iota,
    load,
    product,
    split_f16,
    store,
    tiles,
    warpgroup_barrier,
)

HALF = CHUNK // 2
_PAD = 8  # columns that spread the rows of a float32 matrix over the banks of shared memory


def unit_inverse(m: Array, *, interpret: Any) -> tuple[Array, Array]:
    """Return the left and the right half of (I + strictly_upper(m))^-1, each [64, 32] float32.

    Entries of m on and below the diagonal must be finite and are not used. Takes 18 kB of shared
    memory while it runs.
    """
    half = plgpu.SMEM((CHUNK, HALF), f16, transforms=tiles(HALF))

    def invert(high: Any, low: Any) -> tuple[Array, Array]:
        high[...], low[...] = split_f16(m[:, HALF:])
        diagonal = _diagonal_inverses(m, interpret)
        block = pl.run_scoped(
            lambda *factor: _off_diagonal(diagonal, (high, low), factor, interpret), half, half
        )
        top = iota(CHUNK, HALF, 0) < HALF
        return jnp.where(top, diagonal, 0.0), jnp.where(top, -block, diagonal)

    return pl.run_scoped(invert, half, half)


def _diagonal_inverses(m: Array, interpret: Any) -> Array:
    """Return the inverses of both diagonal blocks, one above the other, [64, 32]."""

    def invert(blocks: Any) -> Array:
        top = iota(CHUNK, HALF, 0) < HALF
        store(blocks.at[:, :HALF], jnp.where(top, m[:, :HALF], m[:, HALF:]))
        warpgroup_barrier(interpret)
        (_substitute_interpreted if interpret else _substitute)(blocks)
        warpgroup_barrier(interpret)
        diagonal = load(blocks.at[:, :HALF], WGMMA, optimized=False)
        warpgroup_barrier(interpret)  # the buffer is reused
        return diagonal

    return pl.run_scoped(invert, plgpu.SMEM((CHUNK, HALF + _PAD), f32))


def _off_diagonal(
    diagonal: Array, corner: tuple[Any, Any], factor: tuple[Any, ...], interpret: Any
) -> Array:
    """Return D1 B D2 in the upper 32 rows, for diagonal blocks D1, D2 and off-diagonal B."""
    high, low = split_f16(diagonal)
    factor[0][...], factor[1][...] = high, low
    plgpu.commit_smem()
    b_high, b_low = (ref.at[pl.ds(0, HALF)] for ref in corner)
    d_high, d_low = (ref.at[pl.ds(HALF, HALF)] for ref in factor)
    left, _ = product((low, b_high), (high, b_low), (high, b_high), interpret=interpret)
    l_high, l_low = split_f16(left)
    block, _ = product((l_low, d_high), (l_high, d_low), (l_high, d_high), interpret=interpret)
    return block


def _substitute(blocks: Any) -> None:
    """Invert both blocks in place; thread t < 64 computes column t % 32 of block t // 32."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def substitute(_: Any, blocks: Any) -> None:
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
            for i in reversed(range(HALF)):
                row = arith.addi(base, const(i))
                on_diagonal = arith.cmpi(arith.CmpIPredicate.eq, column, const(i))
                # Four independent sums hide the latency of additions.
                sums = [arith.select(on_diagonal, one, zero), zero, zero, zero]
                for start in range(0, HALF, 4):
                    inside = [j for j in range(start, start + 4) if j in minus]
                    if not inside:
                        continue
                    entries = vector.load(four, blocks, [row, const(start)])
                    for j in inside:
                        entry = vector.extract(entries, [], [j - start])
                        sums[j % 4] = math.fma(entry, minus[j], sums[j % 4])
                minus[i] = arith.negf(arith.addf(arith.addf(*sums[:2]), arith.addf(*sums[2:])))
            utils.warp_barrier()  # a warp has read its whole block
            for i, entry in minus.items():
                memref.store(arith.negf(entry), blocks, [arith.addi(base, const(i)), column])

    substitute(blocks)  # pyright: ignore[reportCallIssue]


def _substitute_interpreted(blocks: Any) -> None:
    """Invert both blocks in place for Pallas's interpreter, which cannot run inlined code."""
    m = blocks[:, :HALF]
    for start in (0, HALF):
        strict = jnp.triu(m[start : start + HALF], 1)
        x = jnp.eye(HALF, dtype=f32)
        for i in reversed(range(HALF)):
            x = x.at[i].add(-strict[i] @ x)
        blocks[start : start + HALF, :HALF] = x
