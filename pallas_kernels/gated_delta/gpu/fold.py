"""Maps of segments folded in order: the states between them, and backwards their cotangents."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.gpu.tiles import (
    SLICE,
    WGMMA,
    accumulate,
    bf16,
    f32,
    kernel,
    load,
    split,
    store,
    tiles,
)

_STAGES = 2


def fold(
    high: Array, low: Array, added: Array, start: Array, *, reverse: bool, interpret: Any
) -> Array:
    """X_{i+1} = X_i M_i + added_i from X_0 = start; reverse: X_i = X_{i+1} M_i^T + added_i.

    Products in three bfloat16 passes, relative error near 1e-5.

    Args:
        high, low: Parts of M, [B, n, H, K, K] bfloat16.
        added: [B, n, H, V, K] float32.
        start: [B, H, V, K] float32: X_0, or X_n in reverse.
        reverse: Whether to begin at the end.
        interpret: As in Plan.

    Returns:
        All X, [B, n + 1, H, V, K] float32.
    """
    batch, count, heads, value_dim, key_dim = added.shape

    def body(high_ref, low_ref, added_ref, start_ref, out_ref, high_s, low_s, added_s, full):
        i, head, b = (lax.axis_index(name) for name in ("slice", "head", "batch"))
        rows = pl.ds(i * SLICE, SLICE)
        at = lambda step: count - 1 - step if reverse else step
        turn = lambda ref: ref.T if reverse else ref

        def fetch(step: Any) -> None:
            slot, place = lax.rem(step, _STAGES), (b, at(step), head)
            plgpu.copy_gmem_to_smem(high_ref.at[place], high_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(low_ref.at[place], low_s.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(added_ref.at[(*place, rows)], added_s.at[slot], full.at[slot])

        for step in range(min(_STAGES, count)):
            fetch(jnp.int32(step))

        def advance(step: Any, x: Array) -> Array:
            slot = lax.rem(step, _STAGES)
            store(out_ref.at[b, at(step) + (1 if reverse else 0), head, rows], x)
            x_high, x_low = split(x)
            plgpu.barrier_wait(full.at[slot])
            m_high, m_low = turn(high_s.at[slot]), turn(low_s.at[slot])
            pairs = ((x_low, m_high), (x_high, m_low), (x_high, m_high))
            x = accumulate(load(added_s.at[slot], WGMMA), *pairs, interpret=interpret)
            plgpu.commit_smem()  # all warps have read the slot
            pl.when(step + _STAGES < count)(lambda: fetch(step + _STAGES))
            return x

        first = load(start_ref.at[b, head, rows], WGMMA, optimized=False)
        last = lax.fori_loop(0, count, advance, first)
        store(out_ref.at[b, 0 if reverse else count, head, rows], last)

    return kernel(
        "fold_back" if reverse else "fold",
        body,
        grid={"slice": value_dim // SLICE, "head": heads, "batch": batch},
        scratch=[
            plgpu.SMEM((_STAGES, key_dim, key_dim), bf16, transforms=tiles()),
            plgpu.SMEM((_STAGES, key_dim, key_dim), bf16, transforms=tiles()),
            plgpu.SMEM((_STAGES, SLICE, key_dim), f32, transforms=tiles(32, itemsize=4)),
            plgpu.Barrier(num_barriers=_STAGES, num_arrivals=3),
        ],
        out_type=jax.ShapeDtypeStruct((batch, count + 1, heads, value_dim, key_dim), f32),
        interpret=interpret,
    )(high, low, added, start)
