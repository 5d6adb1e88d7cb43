"""Helpers of the kernels for NVIDIA Hopper: tile shapes, layouts, differences between JAX versions.

Matrices of a chunk are in registers in the layout of wgmma's accumulators, 64 rows per warpgroup.
A state is kept transposed, [V, K], in slices of 64 rows: the products that carry it from chunk to
chunk then take it from registers, and it never passes through shared memory.
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
ROWS = WGMMA.reduce(1)  # one number per row of a WGMMA matrix
COLUMNS = WGMMA.reduce(0)  # one number per column

TINY = 1e-30  # 1 / TINY is still a finite float32
_JAX_0_10 = jax.__version__.startswith("0.10.")


def tiles(columns: int = 64, itemsize: int = 2) -> tuple[Any, ...]:
    """Return tiling and swizzle of a matrix in shared memory for wgmma and the copy engine."""
    return (
        plgpu.TilingTransform((8, columns)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(itemsize * columns),  # pyright: ignore[reportAbstractUsage]
    )


def load(ref: Any, layout: Any, *, optimized: bool = True) -> Array:
    """Read a reference into registers; `optimized` requires a load without bank conflicts."""
    index = ((),) if _JAX_0_10 else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def load_transposed(ref: Any) -> Array:
    """Read the transpose of a 16-bit tile in shared memory into registers."""
    if _JAX_0_10:
        return plgpu.layout_cast(load(ref.T, plgpu.Layout.WGMMA_TRANSPOSED), WGMMA)
    return load(ref.T, WGMMA)


def store(ref: Any, x: Array) -> None:
    """Write registers to device memory, or to plain shared memory."""
    if write := getattr(plgpu, "store", None):  # from jax 0.12 on
        write(ref, x, optimized=False)
    else:
        ref[...] = x


def warpgroup_barrier(interpret: Any) -> None:
    """Wait for all warps of the warpgroup.

    Enough before a copy or a product overwrites memory that was read, and between plain reads and
    writes. Writes that a copy or a product reads need `plgpu.commit_smem`, whose fence also waits
    for all stores to device memory.
    """
    if interpret:  # the interpreter cannot run inlined code
        plgpu.commit_smem()
    else:
        plgpu.inline_mgpu()(lambda _: utils.warpgroup_barrier())()


def zeros(rows: int, columns: int) -> Array:
    """Return a float32 matrix of zeros."""
    return plgpu.layout_cast(jnp.zeros((rows, columns), f32), WGMMA)


def iota(rows: int, columns: int, dimension: int) -> Array:
    """Return row (dimension 0) or column (dimension 1) numbers."""
    return plgpu.broadcasted_iota(jnp.int32, (rows, columns), dimension, layout=WGMMA)


def by_row(x: Array, columns: int) -> Array:
    """Repeat one number per row over the columns."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))


def by_column(x: Array, rows: int) -> Array:
    """Repeat one number per column over the rows."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))


def product(
    *pairs: tuple[Any, Any], interpret: Any, overlap_with: Callable[[], Any] = lambda: None
) -> tuple[Array, Any]:
    """Return the float32 sum of the products of pairs, and the result of `overlap_with`.

    `overlap_with` runs while the products do. The left matrix of a pair is in registers or in
    shared memory, the right one in shared memory.
    """
    if interpret:  # the interpreter supports neither register operands nor initial accumulators
        products = [_read(a) @ _read(b) for a, b in pairs]
        return functools.reduce(jnp.add, products), overlap_with()
    shape = (pairs[0][0].shape[0], pairs[0][1].shape[1])

    def run(acc: Any) -> tuple[Array, Any]:
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)
        other = overlap_with()
        return acc[...], other

    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef(shape, f32))


def accumulate(start: Array, *pairs: tuple[Any, Any], interpret: Any) -> Array:
    """Return start + the sum of the products of pairs, in the registers of start."""
    if interpret:
        return start + product(*pairs, interpret=interpret)[0]

    def run(acc: Any) -> None:
        for a, b in pairs:
            plgpu.wgmma(acc, a, b)

    accumulator: Any = plgpu.WGMMAAccumulatorRef.init(start)
    return pl.run_state(run)(accumulator)


def row_scales(x: Array) -> Array:
    """Return the largest absolute entry of each row, at least TINY, float32."""
    return jnp.maximum(jnp.abs(x).max(1).astype(f32), TINY)


def scaled(x: Array) -> tuple[Array, Array]:
    """Return x in float16, each row divided by its largest absolute entry, and these entries.

    So x keeps the 11 bits of float16 at any magnitude.
    """
    scale = row_scales(x)
    return (x * by_row(1 / scale, x.shape[1])).astype(f16), scale


def scaled_product(
    x: Array, tile: Any, *, interpret: Any, overlap_with: Callable[[], Any] = lambda: None
) -> tuple[Array, Any]:
    """Return x @ tile for float32 x and a float16 tile, with x scaled by `scaled`."""
    operand, scale = scaled(x)
    y, other = product((operand, tile), interpret=interpret, overlap_with=overlap_with)
    return y * by_row(scale, y.shape[1]), other


def _read(x: Any) -> Array:
    return (x if isinstance(x, jax.Array) else x[...]).astype(f32)


def split(x: Array) -> tuple[Array, Array]:
    """Split x into two bfloat16 matrices whose sum is x to 15 bits.

    The first is truncated, not rounded: the hardware converts two such float32 numbers at once.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
    high = lax.bitcast_convert_type(bits, f32)
    return high.astype(bf16), (x - high).astype(bf16)


def split_f16(x: Array) -> tuple[Array, Array]:
    """Split x, up to 65504, into two float16 matrices whose sum is x to 22 bits or 3e-8."""
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
    """Make a named `plgpu.kernel` with named grid and cluster axes of single warpgroups.

    No barriers are added around shared memory: the kernels place their own.
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
