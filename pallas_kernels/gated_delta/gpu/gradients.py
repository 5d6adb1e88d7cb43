"""Gradients of a chunk from its start state and the cotangent of its end state, all in parallel."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.gpu import inverse
from pallas_kernels.gated_delta.gpu.tiles import (
    CHUNK,
    COLUMNS,
    ROWS,
    SLICE,
    WGMMA,
    accumulate,
    bf16,
    by_column,
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
    """dK, dV, and dbeta and dg of every token.

    With S the state before the chunk, D the cotangent after it, T = (I + L)^-1, and sums over
    slices of V where a product contracts it:

        R = diag(r) V - gamma K S     dR = diag(beta) Y D     dX = R D^T     dV = diag(r) dR
        Z = T diag(beta) dX           P = -strictly_lower(Y Z^T)             Q = diag(beta) P
        dK = Z - gamma dR S^T + Q K + Q^T K          dbeta = rowsum(dX * Y + P * K K^T)
        dg_t = gamma (<D, S> - <dR, K S>) + sum_{i<t} <v_i, dv_i>

    Args:
        k, y: [N, block, H, K] bfloat16.
        v: [N, block, H, V] bfloat16.
        gates: [N, H, chunks, 3, 64] float32.
        states, cotangents: S^T and D^T, [N, H, chunks, V, K] bfloat16.
        interpret: As in Plan.

    Returns:
        dK and dV in shape and dtype of k and v, and [N, H, chunks, 2, 64] float32.
    """
    blocks, _, heads, key_dim = k.shape

    def body(k_ref, y_ref, v_ref, gates_ref, s_ref, d_ref, dk_ref, dv_ref, rows_ref, *scratch):
        k_tile, y_tile, gate_rows, sums, full = scratch
        n, head, chunk = (lax.axis_index(name) for name in ("block", "head", "chunk"))
        tokens, entry = (n, pl.ds(chunk * CHUNK, CHUNK), head), (n, head, chunk)
        plgpu.copy_gmem_to_smem(k_ref.at[tokens], k_tile, full)
        plgpu.copy_gmem_to_smem(y_ref.at[tokens], y_tile, full)
        plgpu.copy_gmem_to_smem(gates_ref.at[entry], gate_rows, full)

        def by_values(*scratch: Any) -> tuple[Array, Array, Array]:
            slices = _Slices(v_ref.at[tokens], s_ref.at[entry], d_ref.at[entry], *scratch)
            slices.fetch(0)
            plgpu.barrier_wait(full)
            tile = _Tile(k_tile, y_tile, gate_rows, interpret)
            return _through_values(tile, slices, dv_ref.at[tokens], sums, v.shape[-1])

        dx, drs, dg = pl.run_scoped(by_values, *_Slices.scratch(key_dim))
        tile = _Tile(k_tile, y_tile, gate_rows, interpret)
        dk, dbeta = pl.run_scoped(
            lambda *scratch: _through_keys(tile, dx, drs, *scratch),
            plgpu.SMEM((CHUNK, key_dim), bf16, transforms=tiles(inverse.HALF)),
            plgpu.SMEM((CHUNK, CHUNK), bf16, transforms=tiles()),
            inverse.scratch(),
        )
        store(rows_ref.at[(*entry, 0)], dbeta)
        store(rows_ref.at[(*entry, 1)], dg)
        plgpu.commit_smem()  # all warps have read the keys
        k_tile[...] = dk.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[tokens])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    rows = jax.ShapeDtypeStruct((*gates.shape[:3], 2, CHUNK), f32)
    return kernel(
        "gradients",
        body,
        grid={"chunk": gates.shape[2], "head": heads, "block": blocks},
        scratch=[
            plgpu.SMEM((CHUNK, key_dim), bf16, transforms=tiles()),
            plgpu.SMEM((CHUNK, key_dim), bf16, transforms=tiles()),
            plgpu.SMEM((3, CHUNK), f32),
            plgpu.SMEM((2, CHUNK), f32),
            plgpu.Barrier(num_arrivals=3),
        ],
        out_type=[like(k), like(v), rows],
        interpret=interpret,
    )(k, y, v, gates, states, cotangents)


class _Tile(NamedTuple):
    """A chunk's K, Y and gates in shared memory."""

    k: Any
    y: Any
    gates: Any
    interpret: Any

    @property
    def r(self) -> Array:
        return load(self.gates.at[0], ROWS, optimized=False)

    @property
    def beta(self) -> Array:
        return load(self.gates.at[1], ROWS, optimized=False)

    @property
    def gamma(self) -> Array:
        return self.gates[2, 0]


class _Slices(NamedTuple):
    """Slices of V and of the rows of S^T and D^T: where they come from and where they go."""

    v_ref: Any
    s_ref: Any
    d_ref: Any
    v: Any
    s: Any
    d: Any
    full: Any

    @staticmethod
    def scratch(key_dim: int) -> list[Any]:
        state = lambda: plgpu.SMEM((SLICE, key_dim), bf16, transforms=tiles())
        values = plgpu.SMEM((CHUNK, SLICE), bf16, transforms=tiles())
        return [values, state(), state(), plgpu.Barrier(num_arrivals=3)]

    def fetch(self, first: int) -> None:
        """Starts the copies of one slice."""
        part = pl.ds(first, SLICE)
        plgpu.copy_gmem_to_smem(self.v_ref.at[:, part], self.v, self.full)
        plgpu.copy_gmem_to_smem(self.s_ref.at[part], self.s, self.full)
        plgpu.copy_gmem_to_smem(self.d_ref.at[part], self.d, self.full)

    def overlap(self) -> Array:
        """<D, S> by rows of the slice."""
        return (load(self.d, WGMMA).astype(f32) * load(self.s, WGMMA).astype(f32)).sum(1)


def _through_values(
    tile: _Tile, slices: _Slices, dv_ref: Any, sums: Any, value_dim: int
) -> tuple[Array, Array, Array]:
    """dX and dR S^T, [C, K], and dg; writes dV."""
    static = {"interpret": tile.interpret}
    r, beta = by_row(tile.r, SLICE), by_row(tile.beta, SLICE)
    dx = drs = zeros(CHUNK, tile.k.shape[1])
    vdv = carried = plgpu.layout_cast(jnp.zeros((CHUNK,), f32), ROWS)
    for first in range(0, value_dim, SLICE):
        if first:
            slices.fetch(first)
        plgpu.barrier_wait(slices.full)
        carried += slices.overlap()
        read = lambda: load(slices.v, WGMMA)
        ks, v = product((tile.k, slices.s.T), meanwhile=read, **static)
        v = v.astype(f32)
        dr = product((tile.y, slices.d.T), **static)[0] * beta
        dv = r * dr
        vdv += (v * dv).sum(1)
        carried -= (dr * ks).sum(1)
        residual = (r * v - tile.gamma * ks).astype(bf16)
        dx = accumulate(dx, (residual, slices.d), **static)
        drs = accumulate(drs, (dr.astype(bf16), slices.s), **static)
        plgpu.commit_smem()  # all warps have read the slice
        slices.v[...] = dv.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slices.v, dv_ref.at[:, pl.ds(first, SLICE)])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    return dx, drs, _decay_gradient(vdv, tile.gamma * carried, sums)


def _decay_gradient(vdv: Array, carried: Array, sums: Any) -> Array:
    """All of `carried`, and <v, dv> of the tokens before each."""
    store(sums.at[0], vdv)
    store(sums.at[1], carried)
    plgpu.commit_smem()
    vdv, carried = (by_column(load(sums.at[i], COLUMNS, optimized=False), CHUNK) for i in (0, 1))
    return (carried + jnp.where(_below(), vdv, 0.0)).sum(1)


def _through_keys(
    tile: _Tile, dx: Array, drs: Array, z_tile: Any, q_tile: Any, scratch: inverse.Scratch
) -> tuple[Array, Array]:
    """dK [C, K], and dbeta."""
    static = {"interpret": tile.interpret}
    beta = tile.beta
    # What is large is used up in turn: registers are short.
    z_tile[...] = (dx * by_row(beta, dx.shape[1])).astype(bf16)
    dbeta = (dx * load(tile.y, WGMMA).astype(f32)).sum(1)
    gram, _ = product((tile.k, tile.k.T), **static)
    lower = gram * by_row(beta, CHUNK)
    halves = inverse.unit_inverse(lower, scratch, upper=False, **static)
    parts = (z_tile.at[pl.ds(start, inverse.HALF)] for start in (0, inverse.HALF))
    pairs = ((half.astype(bf16), part) for half, part in zip(halves, parts, strict=True))
    z, _ = product(*pairs, **static)
    dk = z - tile.gamma * drs
    plgpu.commit_smem()  # all warps have read diag(beta) dX
    z_tile[...] = z.astype(bf16)
    plgpu.commit_smem()
    yz, _ = product((load(tile.y, WGMMA), z_tile.T), **static)
    p = jnp.where(_below(), -yz, 0.0)
    dbeta += (p * gram).sum(1)
    q = (p * by_row(beta, CHUNK)).astype(bf16)
    q_tile[...] = q
    plgpu.commit_smem()
    return accumulate(dk, (q, tile.k), (q_tile.T, tile.k), **static), dbeta


def _below() -> Array:
    """Where a column stands before its row."""
    return iota(CHUNK, CHUNK, 1) < iota(CHUNK, CHUNK, 0)
