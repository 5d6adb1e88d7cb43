"""Gradients of a chunk from its start state and the cotangent of its end state, all in parallel."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

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
    f16,
    f32,
    iota,
    join_warps,
    kernel,
    load,
    load_transposed,
    product,
    split,
    store,
    tiles,
    zeros,
)


def gradients(
    k: Array,
    y: Array,
    u: Array,
    v: Array,
    gates: Array,
    states: Array,
    cotangents: Array,
    *,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """dK, dV, and dbeta and dg of every token.

    With S the state before the chunk, D the cotangent after it, T = U^T = (I + L)^-1, and sums over
    slices of V where a product contracts it:

        R = diag(r) V - gamma K S     dR = diag(beta) Y D     dX = R D^T     dV = diag(r) dR
        Z = T diag(beta) dX           P = -strictly_lower(Y Z^T)             Q = diag(beta) P
        dK = Z - gamma dR S^T + Q K + Q^T K          dbeta = rowsum(dX * Y + P * K K^T)
        dg_t = gamma (<D, S> - <dR, K S>) + sum_{i<t} <v_i, dv_i>

    Args:
        k: [N, block, H, K] bfloat16.
        y: The same in float16.
        u: [N, H, chunks, 64, 64] float16.
        v: [N, block, H, V] bfloat16.
        gates: [N, H, chunks, 4, 64] float32.
        states, cotangents: S^T and D^T, [N, H, chunks, V, K] bfloat16.
        interpret: As in Plan.

    Returns:
        dK and dV in shape and dtype of k and v, and [N, H, chunks, 2, 64] float32.
    """
    blocks, _, heads, key_dim = k.shape

    def body(*refs):
        k_ref, y_ref, u_ref, v_ref, gates_ref, s_ref, d_ref = refs[:7]
        dk_ref, dv_ref, rows_ref, *scratch = refs[7:]
        k_tile, y_tile, full = scratch
        n, head, chunk = (lax.axis_index(name) for name in ("block", "head", "chunk"))
        tokens, entry = (n, pl.ds(chunk * CHUNK, CHUNK), head), (n, head, chunk)
        plgpu.copy_gmem_to_smem(k_ref.at[tokens], k_tile, full)
        plgpu.copy_gmem_to_smem(y_ref.at[tokens], y_tile, full)

        gates = gates_ref.at[entry]
        r, beta = (load(gates.at[i], ROWS, optimized=False) for i in (0, 1))
        tile = _Tile(k_tile, y_tile, r, beta, gates[2, 0], interpret)

        def by_values(*scratch: Any) -> _Sums:
            sources = v_ref.at[tokens], s_ref.at[entry], d_ref.at[entry], dv_ref.at[tokens]
            return _through_values(tile, _Slices(*sources, *scratch), full, v.shape[-1])

        sums = pl.run_scoped(by_values, *_Slices.scratch(key_dim, v.shape[-1]))
        dk, dbeta, dg = pl.run_scoped(
            lambda *scratch: _through_keys(tile, u_ref.at[entry], sums, *scratch),
            *_keys_scratch(key_dim),
        )
        join_warps(interpret)  # nobody needs the keys
        k_tile[...] = dk.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(k_tile, dk_ref.at[tokens])
        store(rows_ref.at[(*entry, 0)], dbeta)
        store(rows_ref.at[(*entry, 1)], dg)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    rows = jax.ShapeDtypeStruct((*gates.shape[:3], 2, CHUNK), f32)
    return kernel(
        "gradients",
        body,
        grid={"block": blocks, "chunk": gates.shape[2], "head": heads},
        scratch=[
            plgpu.SMEM((CHUNK, key_dim), bf16, transforms=tiles()),
            plgpu.SMEM((CHUNK, key_dim), f16, transforms=tiles()),
            plgpu.Barrier(num_arrivals=2),
        ],
        out_type=[like(k), like(v), rows],
        interpret=interpret,
    )(k, y, u, v, gates, states, cotangents)


class _Tile(NamedTuple):
    """A chunk's K and Y in shared memory, and its gates."""

    k: Any
    y: Any
    r: Array  # a number a row, as beta
    beta: Array
    gamma: Array
    interpret: Any

    def read_y(self) -> Array:
        return load(self.y, WGMMA).astype(f32).astype(bf16)


class _Slices(NamedTuple):
    """Slices of V and of the rows of S^T and D^T: where they come from and where they go."""

    v_ref: Any
    s_ref: Any
    d_ref: Any
    dv_ref: Any
    v: Any
    s: Any
    d: Any
    full: Any

    @staticmethod
    def scratch(key_dim: int, value_dim: int) -> list[Any]:
        slots = min(2, value_dim // SLICE)  # as many as let two programs fit a multiprocessor
        state = lambda: plgpu.SMEM((slots, SLICE, key_dim), bf16, transforms=tiles())
        values = plgpu.SMEM((slots, CHUNK, SLICE), bf16, transforms=tiles())
        return [values, state(), state(), plgpu.Barrier(num_barriers=slots, num_arrivals=3)]

    def fetch(self, i: int) -> None:
        """Starts the copies of slice i."""
        slot, part = i % self.v.shape[0], pl.ds(i * SLICE, SLICE)
        full = self.full.at[slot]
        plgpu.copy_gmem_to_smem(self.v_ref.at[:, part], self.v.at[slot], full)
        plgpu.copy_gmem_to_smem(self.s_ref.at[part], self.s.at[slot], full)
        plgpu.copy_gmem_to_smem(self.d_ref.at[part], self.d.at[slot], full)

    def emit(self, i: int, dv: Array) -> None:
        """Writes a slice of dV, from the place of that of V, which has the same layout."""
        tile = self.v.at[i % self.v.shape[0]]
        tile[...] = dv.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, self.dv_ref.at[:, pl.ds(i * SLICE, SLICE)])


class _Sums(NamedTuple):
    """What the slices of V add up to."""

    dx: Array  # [C, K]
    drs: Array  # dR S^T, [C, K]
    vdv: Array  # <v_i, dv_i>, [C]
    carried: Array  # its sum is <D, S> - <dR, K S>, [C]


def _through_values(tile: _Tile, slices: _Slices, full: Any, value_dim: int) -> _Sums:
    """Sums over the slices of V; writes dV."""
    static = {"interpret": tile.interpret}
    count, slots = value_dim // SLICE, slices.v.shape[0]
    for i in range(slots):
        slices.fetch(i)
    plgpu.barrier_wait(full)
    r, beta = by_row(tile.r, SLICE), by_row(tile.beta, SLICE)
    dx = drs = zeros(CHUNK, tile.k.shape[1])
    vdv = carried = plgpu.layout_cast(jnp.zeros((CHUNK,), f32), ROWS)
    for i in range(count):
        v_tile, s_tile, d_tile = (ref.at[i % slots] for ref in (slices.v, slices.s, slices.d))
        plgpu.barrier_wait(slices.full.at[i % slots])
        overlap = lambda s=s_tile, d=d_tile: _overlap(s, d)
        yd, both = product((tile.read_y(), d_tile.T), meanwhile=overlap, **static)
        dr = yd * beta
        dv = r * dr
        v = load(v_tile, WGMMA).astype(f32)
        vdv += (v * dv).sum(1)
        slices.emit(i, dv)
        ks, _ = product((tile.k, s_tile.T), **static)
        carried += both - (dr * ks).sum(1)
        # Both parts: where keys are alike, dX cancels in Z, and rounding errors of R would stay.
        pairs = ((part, d_tile) for part in split(r * v - tile.gamma * ks))
        dx = accumulate(dx, *pairs, **static)
        drs = accumulate(drs, (dr.astype(bf16), s_tile), **static)
        if i + slots < count:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            join_warps(tile.interpret)  # the slice is free
            slices.fetch(i + slots)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    join_warps(tile.interpret)  # the space of the slices serves anew
    return _Sums(dx, drs, vdv, carried)


def _overlap(s: Any, d: Any) -> Array:
    """<D, S> by rows of a slice."""
    return (load(d, WGMMA).astype(f32) * load(s, WGMMA).astype(f32)).sum(1)


def _decay_gradient(sums: _Sums, gamma: Array, scratch: Any, interpret: Any) -> Array:
    """dg: gamma times all of `carried`, and <v, dv> of the tokens before each."""
    store(scratch.at[0], sums.vdv)
    store(scratch.at[1], gamma * sums.carried)
    join_warps(interpret)
    vdv, carried = (by_column(load(scratch.at[i], COLUMNS, optimized=False), CHUNK) for i in (0, 1))
    return (carried + jnp.where(_below(), vdv, 0.0)).sum(1)


def _keys_scratch(key_dim: int) -> list[Any]:
    part = lambda: plgpu.SMEM((CHUNK, key_dim), bf16, transforms=tiles())
    square = lambda dtype: plgpu.SMEM((CHUNK, CHUNK), dtype, transforms=tiles())
    rows = plgpu.SMEM((2, CHUNK), f32)
    return [part(), part(), square(bf16), square(f16), rows, plgpu.Barrier()]


def _through_keys(
    tile: _Tile,
    u_ref: Any,
    sums: _Sums,
    high_tile: Any,
    low_tile: Any,
    q_tile: Any,
    u_tile: Any,
    rows: Any,
    full: Any,
) -> tuple[Array, Array, Array]:
    """dK [C, K], dbeta and dg."""
    static = {"interpret": tile.interpret}
    plgpu.copy_gmem_to_smem(u_ref, u_tile, full)
    beta = tile.beta
    # What is large is used up in turn: registers are short.
    high_tile[...], low_tile[...] = split(sums.dx * by_row(beta, sums.dx.shape[1]))
    dbeta = (sums.dx * load(tile.y, WGMMA).astype(f32)).sum(1)
    dg = _decay_gradient(sums, tile.gamma, rows, tile.interpret)
    plgpu.commit_smem()
    plgpu.barrier_wait(full)
    t_high, t_low = split(load_transposed(u_tile).astype(f32))
    z, _ = product((t_low, high_tile), (t_high, low_tile), (t_high, high_tile), **static)
    dk = z - tile.gamma * sums.drs
    join_warps(tile.interpret)  # nobody needs diag(beta) dX
    high_tile[...], low_tile[...] = split(z)
    plgpu.commit_smem()
    y = tile.read_y()
    yz, _ = product((y, low_tile.T), (y, high_tile.T), **static)
    gram, _ = product((tile.k, tile.k.T), **static)
    p = jnp.where(_below(), -yz, 0.0)
    dbeta += (p * gram).sum(1)
    q = (p * by_row(beta, CHUNK)).astype(bf16)
    q_tile[...] = q
    plgpu.commit_smem()
    return accumulate(dk, (q, tile.k), (q_tile.T, tile.k), **static), dbeta, dg


def _below() -> Array:
    """Where a column stands before its row."""
    return iota(CHUNK, CHUNK, 1) < iota(CHUNK, CHUNK, 0)
