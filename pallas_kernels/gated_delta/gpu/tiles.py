"""What the kernels for NVIDIA Hopper share: sizes, layouts, calls that differ by version of JAX.

Matrices of a chunk live in registers in the layout of wgmma's accumulators, 64 rows to a warpgroup.
A state is kept transposed, [V, K], in slices of 64 rows: then the products that carry it from chunk
to chunk take it from registers, and it never passes through shared memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

CHUNK = 64  # tokens of a chunk: the rows of one wgmma
SLICE = 64  # rows of a transposed state that one warpgroup carries

bf16, f16, f32 = jnp.bfloat16, jnp.float16, jnp.float32
WGMMA = plgpu.Layout.WGMMA
ROWS = WGMMA.reduce(1)  # one number a row of a WGMMA matrix
COLUMNS = WGMMA.reduce(0)  # one number a column

TINY = 1e-30  # and its inverse are float32 numbers
_JAX_0_10 = jax.__version__.startswith("0.10.")


def tiles(columns: int = 64, itemsize: int = 2) -> tuple[Any, ...]:
    """Tiling and swizzle of a matrix in shared memory for wgmma and the copy engine."""
    return (
        plgpu.TilingTransform((8, columns)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(itemsize * columns),  # pyright: ignore[reportAbstractUsage]
    )


def load(ref: Any, layout: Any, *, optimized: bool = True) -> Array:
    """Reads a reference into registers; `optimized` insists on no bank conflicts."""
    index = ((),) if _JAX_0_10 else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def load_transposed(ref: Any) -> Array:
    """The transpose of a 16-bit tile in shared memory."""
    if _JAX_0_10:
        return plgpu.layout_cast(load(ref.T, plgpu.Layout.WGMMA_TRANSPOSED), WGMMA)
    return load(ref.T, WGMMA)


def store(ref: Any, x: Array) -> None:
    """Writes registers to device memory, or to plain shared memory."""
    if write := getattr(plgpu, "store", None):  # from jax 0.12 on
        write(ref, x, optimized=False)
    else:
        ref[...] = x


def join_warps(interpret: Any) -> None:
    """Waits for all warps of the warpgroup: what they have read or written may be used by others.

    Enough before a copy or a product overwrites what was read, and between plain reads and writes.
    What is written for a copy or a product to read needs `plgpu.commit_smem`, whose fence also
    waits for all stores to device memory.
    """
    if interpret:  # the interpreter runs no inlined code
        plgpu.commit_smem()
    else:
        plgpu.inline_mgpu()(lambda _: utils.warpgroup_barrier())()


def zeros(rows: int, columns: int) -> Array:
    """A float32 matrix of zeros."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), f32), WGMMA)


def iota(rows: int, columns: int, dimension: int) -> Array:
    """Row or column numbers."""
    return plgpu.broadcasted_iota(jnp.int32, (rows, columns), dimension, layout=WGMMA)


def by_row(x: Array, columns: int) -> Array:
    """Repeats one number a row over the columns."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))


def by_column(x: Array, rows: int) -> Array:
    """Repeats one number a column over the rows."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))


def product(
    *pairs: tuple[Any, Any], interpret: Any, meanwhile: Callable[[], Any] = lambda: None
) -> tuple[Array, Any]:
    """Sum of the products of pairs, float32, and what `meanwhile` computes beside them.

    The left matrix of a pair is in registers or in shared memory, the right one in shared memory.
    """
    if interpret:  # the interpreter multiplies no registers, and starts no sum with values
        products = [_read(a) @ _read(b) for a, b in pairs]
        return functools.reduce(jnp.add, products), meanwhile()
    shape = (pairs[0][0].shape[0], pairs[0][1].shape[1])

    def run(acc: Any) -> tuple[Array, Any]:
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        other = meanwhile()
        return acc[...], other

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, f32))


def accumulate(start: Array, *pairs: tuple[Any, Any], interpret: Any) -> Array:
    """start + the sum of the products of pairs, in the registers of start."""
    if interpret:
        return start + product(*pairs, interpret=interpret)[0]

    def run(acc: Any) -> None:
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)

    accumulator: Any = plgpu.WGMMAAccumulatorRef.init(start)
    return pl.run_state(run)(accumulator)


def row_sizes(x: Array) -> Array:
    """The largest absolute entry of each row, or a tiny number, float32."""
    return jnp.maximum(jnp.abs(x).max(1).astype(f32), TINY)


def scaled(x: Array) -> tuple[Array, Array]:
    """x with each row divided by its largest entry, in float16, and these entries.

    So x keeps the 11 bits of float16 at any size.
    """
    size = row_sizes(x)
    return (x * by_row(1 / size, x.shape[1])).astype(f16), size


def scaled_product(
    x: Array, tile: Any, *, interpret: Any, meanwhile: Callable[[], Any] = lambda: None
) -> tuple[Array, Any]:
    """x @ tile for float32 x and a float16 tile, with x as by `scaled`."""
    operand, size = scaled(x)
    y, other = product((operand, tile), interpret=interpret, meanwhile=meanwhile)
    return y * by_row(size, y.shape[1]), other


def _read(x: Any) -> Array:
    return (x if isinstance(x, jax.Array) else x[...]).astype(f32)


def split(x: Array) -> tuple[Array, Array]:
    """Two bfloat16 matrices whose sum is x to 15 bits.

    The first is cut off, not rounded: on its float32 form hardware converts two numbers at once.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
    high = lax.bitcast_convert_type(bits, f32)
    return high.astype(bf16), (x - high).astype(bf16)


def split_f16(x: Array) -> tuple[Array, Array]:
    """Two float16 matrices whose sum is x to 22 bits, or to 3e-8, for x up to 65504."""
    high = x.astype(f16)
    return high, (x - high.astype(f32)).astype(f16)


def kernel(
    name: str,
    body: Callable[..., None],
    *,
    grid: dict[str, int],
    scratch: list[Any],
    cluster: dict[str, int] | None = None,
    **options: Any,
) -> Callable[..., Any]:
    """plgpu.kernel under a name, with named grid and cluster axes of single warpgroups.

    No barriers are added around shared memory: the kernels place them where warps meet.
    """
    body.__name__ = f"gated_delta_{name}"
    cluster = cluster or {}
    return plgpu.kernel(
        body,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        cluster=tuple(cluster.values()),
        cluster_names=tuple(cluster),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            reduction_scratch_bytes=0,  # sums are over columns: within a warp
        ),
        **options,
    )
