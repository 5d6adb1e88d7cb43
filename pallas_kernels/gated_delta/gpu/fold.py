"""Fold of segment maps in order: states between segments, or in reverse their cotangents."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.gpu.tiles import (
    COLUMNS,
    SLICE,
    WGMMA,
    by_column,
    f16,
    f32,
    kernel,
    load,
    scaled_product,
    store,
    tiles,
)

_STAGES = 3


def fold(
    matrices: Array, row_scales: Array, added: Array, start: Array, *, reverse: bool, interpret: Any
) -> Array:
    """Fold X_{i+1} = X_i M_i + added_i from X_1 = added_0; reverse: X_i = X_{i+1} M_i^T + added_i.

    Products have float16 operands with one scale per row: relative error near 3e-4 per step, below
    that of M.

    Args:
        matrices: diag(1 / row_scales) M, [B, n, H, K, K] float16; M_0 is not read.
        row_scales: [B, n, H, K] float32.
        added: [B, n, H, V, K] float32.
        start: [B, H, V, K] float32: X_0, or X_n in reverse.
        reverse: Whether to fold from the last segment to the first.
        interpret: As in Plan.

    Returns:
        All X, [B, n + 1, H, V, K] float32; in reverse X_0 is not computed.
    """
    batch, count, heads, value_dim, key_dim = added.shape
    steps = count - 1

    def body(
        m_ref, scales_ref, added_ref, start_ref, out_ref, m_tiles, scale_rows, added_tiles, full
    ):
        i, head, b = (lax.axis_index(name) for name in ("slice", "head", "batch"))
        rows = pl.ds(i * SLICE, SLICE)
        at = lambda step: steps - step if reverse else step + 1

        def fetch(step: Any) -> None:
            slot, place = lax.rem(step, _STAGES), (b, at(step), head)
            plgpu.copy_gmem_to_smem(m_ref.at[place], m_tiles.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(scales_ref.at[place], scale_rows.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(
                added_ref.at[(*place, rows)], added_tiles.at[slot], full.at[slot]
            )

        for step in range(min(_STAGES, steps)):
            fetch(jnp.int32(step))

        def advance(step: Any, x: Array) -> Array:
            slot = lax.rem(step, _STAGES)
            plgpu.barrier_wait(full.at[slot])
            scale = by_column(load(scale_rows.at[slot], COLUMNS), SLICE)
            tile = added_tiles.at[slot]
            run = {"overlap_with": lambda: load(tile, WGMMA), "interpret": interpret}
            if reverse:
                product, added = scaled_product(x, m_tiles.at[slot].T, **run)
                x = product * scale + added
            else:
                product, added = scaled_product(x * scale, m_tiles.at[slot], **run)
                x = product + added
            tile[...] = x  # in the layout of the load
            plgpu.commit_smem()
            place = at(step) if reverse else at(step) + 1
            plgpu.copy_smem_to_gmem(tile, out_ref.at[b, place, head, rows])

            @pl.when((step > 0) & (step - 1 + _STAGES < steps))
            def _refill():
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # that of the step before
                fetch(step - 1 + _STAGES)

            return x

        given = load(start_ref.at[b, head, rows], WGMMA, optimized=False)
        first = given
        if not reverse:
            first = load(added_ref.at[b, 0, head, rows], WGMMA, optimized=False)
            store(out_ref.at[b, 1, head, rows], first)
        lax.fori_loop(0, steps, advance, first)
        store(out_ref.at[b, count if reverse else 0, head, rows], given)
        plgpu.wait_smem_to_gmem(0)

    return kernel(
        "fold_back" if reverse else "fold",
        body,
        grid={"slice": value_dim // SLICE, "head": heads, "batch": batch},
        scratch=[
            plgpu.SMEM((_STAGES, key_dim, key_dim), f16, transforms=tiles()),
            plgpu.SMEM((_STAGES, key_dim), f32),
            plgpu.SMEM((_STAGES, SLICE, key_dim), f32, transforms=tiles(32, itemsize=4)),
            plgpu.Barrier(num_barriers=_STAGES, num_arrivals=3),
        ],
        out_type=jax.ShapeDtypeStruct((batch, count + 1, heads, value_dim, key_dim), f32),
        interpret=interpret,
    )(matrices, row_scales, added, start)
