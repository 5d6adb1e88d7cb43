"""Maps of segments folded in order: the states between them, and backwards their cotangents."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.gpu.tiles import (
    COLUMNS,
    ROWS,
    SLICE,
    WGMMA,
    by_column,
    by_row,
    f16,
    f32,
    kernel,
    load,
    product,
    scaled,
    store,
    tiles,
)

_STAGES = 3


def fold(
    matrices: Array, sizes: Array, added: Array, start: Array, *, reverse: bool, interpret: Any
) -> Array:
    """X_{i+1} = X_i M_i + added_i, with X_1 = added_0; reverse: X_i = X_{i+1} M_i^T + added_i.

    Products of float16 operands, both with a scale a row: relative error near 3e-4 a step, below
    that of M. A warpgroup makes 64 columns of X; the parts of X meet in shared memory.

    Args:
        matrices: diag(1 / sizes) M, [B, n, H, K, K] float16; M_0 is not read.
        sizes: [B, n, H, K] float32.
        added: [B, n, H, V, K] float32.
        start: [B, H, V, K] float32: X_0, or X_n in reverse.
        reverse: Whether to begin at the end.
        interpret: As in Plan.

    Returns:
        All X, [B, n + 1, H, V, K] float32; in reverse X_0 is not made.
    """
    batch, count, heads, value_dim, key_dim = added.shape
    steps, team = count - 1, key_dim // SLICE
    sizes = sizes.reshape(*sizes.shape[:3], team, SLICE)

    def body(m_ref, sizes_ref, added_ref, start_ref, out_ref, *scratch):
        m_tiles, size_rows, added_tiles, operand, operand_sizes, full, *team_barriers = scratch
        i, head, b = (lax.axis_index(name) for name in ("slice", "head", "batch"))
        warpgroup = lax.axis_index("warpgroup") if team > 1 else 0
        part = pl.ds(warpgroup * SLICE, SLICE)
        rows = pl.ds(i * SLICE, SLICE)
        at = lambda step: steps - step if reverse else step + 1
        own = lambda step: warpgroup * _STAGES + lax.rem(step, _STAGES)

        def meet(i: int) -> None:
            """Waits for the other warpgroup."""
            for barrier in team_barriers:
                plgpu.barrier_arrive(barrier.at[i])
                plgpu.barrier_wait(barrier.at[i])

        def fetch(step: Any) -> None:
            slot, place = own(step), (b, at(step), head)
            m = m_ref.at[(*place, part)] if reverse else m_ref.at[(*place, slice(None), part)]
            plgpu.copy_gmem_to_smem(m, m_tiles.at[slot], full.at[slot])
            sizes = sizes_ref.at[(*place, warpgroup)]
            plgpu.copy_gmem_to_smem(sizes, size_rows.at[slot], full.at[slot])
            added = added_ref.at[(*place, rows, part)]
            plgpu.copy_gmem_to_smem(added, added_tiles.at[slot], full.at[slot])

        for step in range(min(_STAGES, steps)):
            fetch(jnp.int32(step))

        def advance(step: Any, x: Array) -> Array:
            slot = own(step)
            plgpu.barrier_wait(full.at[slot])
            size = by_column(load(size_rows.at[slot], COLUMNS), SLICE)
            operand[warpgroup], operand_size = scaled(x if reverse else x * size)
            store(operand_sizes.at[warpgroup], operand_size)
            plgpu.commit_smem()
            meet(0)
            x = _product(operand, operand_sizes, m_tiles.at[slot], reverse, interpret)
            meet(1)  # the operand is free
            tile = added_tiles.at[slot]
            x = (x * size if reverse else x) + load(tile, WGMMA)
            tile[...] = x  # in the layout in which it was read
            plgpu.commit_smem()
            place = at(step) if reverse else at(step) + 1
            plgpu.copy_smem_to_gmem(tile, out_ref.at[b, place, head, rows, part])

            @pl.when((step > 0) & (step - 1 + _STAGES < steps))
            def _refill():
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # that of the step before
                fetch(step - 1 + _STAGES)

            return x

        given = load(start_ref.at[b, head, rows, part], WGMMA, optimized=False)
        first = given
        if not reverse:
            first = load(added_ref.at[b, 0, head, rows, part], WGMMA, optimized=False)
            store(out_ref.at[b, 1, head, rows, part], first)
        lax.fori_loop(0, steps, advance, first)
        store(out_ref.at[b, count if reverse else 0, head, rows, part], given)
        plgpu.wait_smem_to_gmem(0)

    slots = team * _STAGES
    m_part = (SLICE, key_dim) if reverse else (key_dim, SLICE)
    return kernel(
        "fold_back" if reverse else "fold",
        body,
        grid={"slice": value_dim // SLICE, "head": heads, "batch": batch},
        warpgroups=team,
        scratch=[
            plgpu.SMEM((slots, *m_part), f16, transforms=tiles()),
            plgpu.SMEM((slots, SLICE), f32),
            plgpu.SMEM((slots, SLICE, SLICE), f32, transforms=tiles(32, itemsize=4)),
            plgpu.SMEM((team, SLICE, SLICE), f16, transforms=tiles()),
            plgpu.SMEM((team, SLICE), f32),
            plgpu.Barrier(num_barriers=slots, num_arrivals=3),
            *([plgpu.Barrier(num_barriers=2, num_arrivals=team)] if team > 1 else []),
        ],
        out_type=jax.ShapeDtypeStruct((batch, count + 1, heads, value_dim, key_dim), f32),
        interpret=interpret,
    )(matrices, sizes, added, start)


def _product(operand: Any, sizes: Any, m: Any, reverse: bool, interpret: Any) -> Array:
    """X M, or X M^T, for columns of M, or rows; X in parts of 64 columns with sizes of their own."""
    parts = [pl.ds(first, SLICE) for first in range(0, m.shape[1 if reverse else 0], SLICE)]
    factors = [m.at[:, part].T if reverse else m.at[part] for part in parts]
    pairs = list(zip((operand.at[i] for i in range(len(parts))), factors, strict=True))

    def products(first: int) -> list[Array]:
        if first == len(pairs):
            return []
        y, others = product(
            pairs[first], meanwhile=lambda: products(first + 1), interpret=interpret
        )
        return [y, *others]

    size = lambda i: load(sizes.at[i], ROWS, optimized=False)
    scaled = [y * by_row(size(i), SLICE) for i, y in enumerate(products(0))]
    return functools.reduce(jnp.add, scaled)
