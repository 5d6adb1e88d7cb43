"""Gradients of a chunk from its start state and the cotangent of its end state, all in parallel."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.gpu import inverse
from pallas_kernels.gated_delta.gpu.tiles import (
    CHUNK,
    ROWS,
    SLICE,
    WGMMA,
    accumulate,
    bf16,
    by_row,
    f32,
    iota,
    kernel,
    load,
    product,
    store,
    tiles,
    zeros,
)


def gradients(
    k: Array,
    y: Array,
    v: Array,
    gates: Array,
    states: Array,
    cotangents: Array,
    *,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """dK, dV, and per token dbeta, <v, dv>, and shares of <dS, S>.

    With S the state before the chunk, D the cotangent after it, T = (I + L)^-1, and sums over
    slices of V where a product contracts it:

        R = diag(r) V - gamma K S     dR = diag(beta) Y D     dX = R D^T     dV = diag(r) dR
        Z = T diag(beta) dX           P = -strictly_lower(Y Z^T)             Q = diag(beta) P
        dK = Z - gamma dR S^T + Q K + Q^T K
        dbeta = rowsum(dX * Y + P * K K^T)     <dS, S> = gamma (<D, S> - <dR, K S>)

    Args:
        k, y: [N, block, H, K] bfloat16.
        v: [N, block, H, V] bfloat16.
        gates: [N, H, chunks, 3, 64] float32.
        states, cotangents: S^T and D^T, [N, H, chunks, V, K] bfloat16.
        interpret: As in Plan.

    Returns:
        dK and dV in shape and dtype of k and v, and [N, H, chunks, 3, 64] float32.
    """
    blocks, _, heads, key_dim = k.shape

    def body(k_ref, y_ref, v_ref, gates_ref, s_ref, d_ref, dk_ref, dv_ref, rows_ref, *scratch):  # noqa: ANN001
        k_tile, y_tile, gate_rows, full = scratch
        n, head, chunk = (lax.axis_index(name) for name in ("block", "head", "chunk"))
        place, entry = (n, pl.ds(chunk * CHUNK, CHUNK), head), (n, head, chunk)
        plgpu.copy_gmem_to_smem(k_ref.at[place], k_tile, full)
        plgpu.copy_gmem_to_smem(y_ref.at[place], y_tile, full)
        plgpu.copy_gmem_to_smem(gates_ref.at[entry], gate_rows, full)
        plgpu.barrier_wait(full)
        r, beta = (load(gate_rows.at[i], ROWS, optimized=False) for i in (0, 1))
        gamma = gate_rows[2, 0]

        def values(v_tile: Any, s_tile: Any, d_tile: Any, slice_full: Any) -> tuple[Array, ...]:
            """dX and dR S^T [C, K], and the sums over tokens and over rows of states."""
            dx, drs = zeros(CHUNK, key_dim), zeros(CHUNK, key_dim)
            vdv = carried = plgpu.layout_cast(jnp.zeros((CHUNK,), f32), ROWS)
            for first in range(0, v.shape[-1], SLICE):
                columns = pl.ds(first, SLICE)
                plgpu.copy_gmem_to_smem(v_ref.at[(*place, columns)], v_tile, slice_full)
                plgpu.copy_gmem_to_smem(s_ref.at[(*entry, columns)], s_tile, slice_full)
                plgpu.copy_gmem_to_smem(d_ref.at[(*entry, columns)], d_tile, slice_full)
                plgpu.barrier_wait(slice_full)
                ks = product((k_tile, s_tile.T))
                dr = product((y_tile, d_tile.T)) * by_row(beta, SLICE)
                value = load(v_tile, WGMMA).astype(f32)
                residual = value * by_row(r, SLICE) - gamma * ks
                dv = dr * by_row(r, SLICE)
                vdv += (value * dv).sum(1)
                both = load(d_tile, WGMMA).astype(f32) * load(s_tile, WGMMA).astype(f32)
                carried += both.sum(1) - (dr * ks).sum(1)
                dx = accumulate(dx, (residual.astype(bf16), d_tile), interpret=interpret)
                drs = accumulate(drs, (dr.astype(bf16), s_tile), interpret=interpret)
                plgpu.commit_smem()  # all warps have read the tiles
                v_tile[...] = dv.astype(bf16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(v_tile, dv_ref.at[(*place, columns)])
                plgpu.wait_smem_to_gmem(0)
            return dx, drs, vdv, gamma * carried

        def keys(dx: Array, drs: Array, z_tile: Any, q_tile: Any, scratch: Any):
            """dK [C, K], and dbeta."""
            gram = product((k_tile, k_tile.T))
            lower = gram * by_row(beta, CHUNK)
            halves = inverse.unit_inverse(lower, scratch, upper=False, interpret=interpret)
            z_tile[...] = (dx * by_row(beta, key_dim)).astype(bf16)
            y = load(y_tile, WGMMA)
            dbeta = (dx * y.astype(f32)).sum(1)
            plgpu.commit_smem()
            parts = (z_tile.at[pl.ds(start, inverse.HALF)] for start in (0, inverse.HALF))
            z = product(*((t.astype(bf16), b) for t, b in zip(halves, parts, strict=True)))
            plgpu.commit_smem()  # all warps have read diag(beta) dX
            z_tile[...] = z.astype(bf16)
            plgpu.commit_smem()
            below = iota(CHUNK, CHUNK, 1) < iota(CHUNK, CHUNK, 0)
            p = jnp.where(below, -product((y, z_tile.T)), 0.0)
            dbeta += (p * gram).sum(1)
            q = (p * by_row(beta, CHUNK)).astype(bf16)
            q_tile[...] = q
            plgpu.commit_smem()
            pairs = ((q, k_tile), (q_tile.T, k_tile))
            return accumulate(z - gamma * drs, *pairs, interpret=interpret), dbeta

        dx, drs, vdv, carried = pl.run_scoped(
            values,
            plgpu.SMEM((CHUNK, SLICE), bf16, transforms=tiles()),
            plgpu.SMEM((SLICE, key_dim), bf16, transforms=tiles()),
            plgpu.SMEM((SLICE, key_dim), bf16, transforms=tiles()),
            plgpu.Barrier(num_arrivals=3),
        )
        dk, dbeta = pl.run_scoped(
            lambda *scratch: keys(dx, drs, *scratch),
            plgpu.SMEM((CHUNK, key_dim), bf16, transforms=tiles(inverse.HALF)),
            plgpu.SMEM((CHUNK, CHUNK), bf16, transforms=tiles()),
            inverse.scratch(),
        )
        for i, row in enumerate((dbeta, vdv, carried)):
            store(rows_ref.at[(*entry, i)], row)
        plgpu.commit_smem()  # all warps have read the keys
        k_tile[...] = dk.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[place])
        plgpu.wait_smem_to_gmem(0)

    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return kernel(
        body,
        grid={"chunk": gates.shape[2], "head": heads, "block": blocks},
        scratch=[
            plgpu.SMEM((CHUNK, key_dim), bf16, transforms=tiles()),
            plgpu.SMEM((CHUNK, key_dim), bf16, transforms=tiles()),
            plgpu.SMEM(gates.shape[3:], f32),
            plgpu.Barrier(num_arrivals=3),
        ],
        out_type=[like(k), like(v), like(gates)],
        interpret=interpret,
    )(k, y, v, gates, states, cotangents)
