"""Gradients of all tokens, from the states before chunks and the cotangents after segments.

A program walks a segment backwards. The cotangent D^T stays in shared memory, in float16 with a
scale for each row. At every chunk it gives the gradients of the chunk's tokens and becomes the
cotangent before the chunk. The other buffers of a chunk's phases share memory (RefUnion).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.gpu.segments import Segments, walk
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
    kernel,
    load,
    load_transposed,
    product,
    row_scales,
    scaled,
    split,
    store,
    tiles,
    warpgroup_barrier,
)


def gradients(
    k: Array,
    y: Array,
    u: Array,
    v: Array,
    gates: Array,
    states: Array,
    ends: Array,
    *,
    segments: Segments,
    interpret: Any,
) -> tuple[Array, Array, Array, Array]:
    """Compute dK, dV, dbeta and dg of every token, and the cotangent of the initial state.

    With S the state before a chunk, D the cotangent after it, T = U^T = (I + L)^-1, and sums over
    slices of V where a product contracts it:

        R = diag(r) V - gamma K S     dR = diag(beta) Y D     dX = R D^T     dV = diag(r) dR
        Z = T diag(beta) dX           P = -strictly_lower(Y Z^T)             Q = diag(beta) P
        dK = Z - gamma dR S^T + Q K + Q^T K          dbeta = rowsum(dX * Y + P * K K^T)
        dg_t = gamma (<D, S> - <dR, K S>) + sum_{i<t} <v_i, dv_i>

    and gamma (D - K^T dR) is the cotangent before the chunk.

    Args:
        k: [N, block, H, K] bfloat16.
        y: The same in float16.
        u: [N, H, chunks, 64, 64] float16.
        v: [N, block, H, V] bfloat16.
        gates: [N, H, chunks, 4, 64] float32.
        states: S^T before every chunk, [N, H, chunks, V, K] bfloat16.
        ends: D^T, [B, n + 1, H, V, K] float32: from 1 on those after the n segments of a sequence.
        segments: The segments of a block.
        interpret: As in Plan.

    Returns:
        dK and dV in shape and dtype of k and v; dbeta and dg, [N, H, chunks, 2, 64] float32; and
        the transposed cotangent of the state where a sequence begins, [B, H, V, K] float32.
    """
    heads, key_dim, value_dim = *k.shape[2:], v.shape[3]
    sequences, count = len(ends), segments.blocks * segments.count

    def body(*refs):
        k_ref, y_ref, u_ref, v_ref, gates_ref, s_ref, ends_ref = refs[:7]
        dk_ref, dv_ref, rows_ref, first_ref, scales_ref, scratch = refs[7:]
        head = lax.axis_index("head")
        chunks = walk(segments, lax.axis_index("segment"), reverse=True)
        d_scales = scales_ref.at[chunks.place, head]

        def sources(step: Any) -> _Sources:
            chunk = chunks.at(step)
            tokens = chunks.block, pl.ds(chunk * CHUNK, CHUNK), head
            entry = chunks.block, head, chunk
            refs = k_ref, y_ref, v_ref, dk_ref, dv_ref
            others = u_ref, gates_ref, s_ref, rows_ref
            return _Sources(*(x.at[tokens] for x in refs), *(x.at[entry] for x in others))

        def advance(step: Any, zero: Array) -> Array:
            source, following = sources(step), sources(step + 1)
            tile = _Tile.of(source.gates, d_scales, _Scratch.at(scratch, zero), interpret)
            sums = _through_values(tile, source)
            tile = tile.move(scratch, 1)
            dbeta, dg = _through_keys(tile, source, sums)
            tile = tile.move(scratch, 2)
            scales = []
            for i in range(value_dim // SLICE):
                before = _before(tile, source, i)
                first = first_ref.at[chunks.sequence, head, _slice(i)]
                opens = (chunks.number == 0) & (step + 1 == chunks.count)
                pl.when(opens)(lambda first=first, before=before: store(first, before))
                tile.scratch.d[i], scale = scaled(before)
                scales.append(scale)
                if i == 0:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # dK has left
                    warpgroup_barrier(interpret)
                    pl.when(step + 1 < chunks.count)(lambda: _fetch_slices(tile, following))
            plgpu.commit_smem()
            pl.when(step + 1 < chunks.count)(lambda: _fetch_keys(tile, following))
            tile.write_scales(scales)
            store(source.rows.at[0], dbeta)
            store(source.rows.at[1], dg)
            return _hidden_zero(tile.gamma, 0)

        start = _Tile.of(sources(0).gates, d_scales, _Scratch.at(scratch, 0), interpret)
        _fetch_slices(start, sources(0))
        _fetch_keys(start, sources(0))
        scales = []
        for i in range(value_dim // SLICE):
            end = ends_ref.at[chunks.sequence, chunks.number + 1, head, _slice(i)]
            start.scratch.d[i], scale = scaled(load(end, WGMMA, optimized=False))
            scales.append(scale)
        plgpu.commit_smem()
        start.write_scales(scales)
        lax.fori_loop(0, chunks.count, advance, jnp.int32(0))

    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return kernel(
        "gradients",
        body,
        grid={"segment": count, "head": heads},
        scratch=[_Scratch.types(key_dim, value_dim)],
        out_type=[
            like(k),
            like(v),
            jax.ShapeDtypeStruct((segments.blocks, heads, segments.chunks, 2, CHUNK), f32),
            jax.ShapeDtypeStruct((sequences, heads, value_dim, key_dim), f32),
            jax.ShapeDtypeStruct((count, heads, value_dim // SLICE, SLICE), f32),
        ],
        interpret=interpret,
    )(k, y, u, v, gates, states, ends)[:4]


class _Sources(NamedTuple):
    """A chunk in device memory: its inputs, and the destinations of its gradients."""

    k: Any
    y: Any
    v: Any
    dk: Any
    dv: Any
    u: Any
    gates: Any
    s: Any
    rows: Any


class _Scratch(NamedTuple):
    """Shared memory; three groups of matrices, from v, high and dk on, share the same space."""

    k: Any  # [C, K]
    y: Any
    d: Any  # [slices, SLICE, K], rows of D^T divided by their scales
    v: Any  # [slots, C, SLICE]
    s: Any  # [slots, SLICE, K]
    high: Any  # [C, K], as low and z
    low: Any
    u: Any  # [C, C]
    rows: Any  # [2, C]
    dk: Any
    z: Any
    z_scales: Any  # [C]
    q: Any  # [C, C]
    full: Any
    values_full: Any
    u_full: Any

    @staticmethod
    def types(key_dim: int, value_dim: int) -> list[Any]:
        """Return the types; matrices have a leading axis of one, see `_hidden_zero`."""
        matrix = lambda *shape, dtype=bf16: plgpu.SMEM((1, *shape), dtype, transforms=tiles())
        numbers = lambda *shape: plgpu.SMEM((1, *shape), f32)
        count = value_dim // SLICE
        slots = min(2, count)  # as many as let two programs fit a multiprocessor
        keys = matrix(CHUNK, key_dim)
        keys_f16 = matrix(CHUNK, key_dim, dtype=f16)
        shared_space = plgpu.RefUnion(
            [matrix(slots, CHUNK, SLICE), matrix(slots, SLICE, key_dim)],
            [keys, keys, matrix(CHUNK, CHUNK, dtype=f16), numbers(2, CHUNK)],
            [keys, keys_f16, numbers(CHUNK), matrix(CHUNK, CHUNK)],
        )
        barriers = [
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=slots, num_arrivals=2),
            plgpu.Barrier(),
        ]
        d = matrix(count, SLICE, key_dim, dtype=f16)
        return [keys, keys_f16, d, shared_space, *barriers]

    @staticmethod
    def at(refs: Any, zero: Any) -> "_Scratch":
        k, y, d, shared_space, *barriers = refs
        matrices = k, y, d, *(ref for group in shared_space for ref in group)
        return _Scratch(*(ref.at[zero] for ref in matrices), *barriers)


def _hidden_zero(gamma: Array, i: int) -> Array:
    """Return 0, computed so that the compiler cannot know it.

    An address that depends on it is kept neither through the loop nor from one use to the next.
    There are several hundred addresses, which would otherwise spill values from the registers.
    """
    return (gamma < -i).astype(jnp.int32)


class _Tile(NamedTuple):
    """A chunk's gates, and shared memory."""

    gates: Any
    d_scales: Any  # [slices, SLICE], in device memory: shared memory is full
    r: Array  # a number a row, as beta
    beta: Array
    gamma: Array
    scratch: _Scratch
    interpret: Any

    @staticmethod
    def of(gates: Any, d_scales: Any, scratch: _Scratch, interpret: Any) -> "_Tile":
        r, beta = (load(gates.at[i], ROWS, optimized=False) for i in (0, 1))
        return _Tile(gates, d_scales, r, beta, gates[2, 0], scratch, interpret)

    def move(self, scratch: Any, i: int) -> "_Tile":
        """Return the same tile with addresses that the compiler computes again."""
        return self._replace(scratch=_Scratch.at(scratch, _hidden_zero(self.gamma, i)))

    def write_scales(self, scales: list[Array]) -> None:
        """Write the row scales of all slices of D^T, for all warps to read."""
        for i, scale in enumerate(scales):
            store(self.d_scales.at[i], scale)
        warpgroup_barrier(self.interpret)

    def row_scales(self, i: int, layout: Any) -> Array:
        """Load the row scales of slice i of D^T."""
        return load(self.d_scales.at[i], layout, optimized=False)


def _slice(i: int) -> Any:
    return pl.ds(i * SLICE, SLICE)


def _fetch_keys(tile: _Tile, source: _Sources) -> None:
    """Start the copies of K and Y."""
    scratch = tile.scratch
    plgpu.copy_gmem_to_smem(source.k, scratch.k, scratch.full)
    plgpu.copy_gmem_to_smem(source.y, scratch.y, scratch.full)


def _fetch_slices(tile: _Tile, source: _Sources, first: int = 0) -> None:
    """Start the copies of as many slices of V and S^T as there are slots."""
    scratch = tile.scratch
    slots, count = scratch.v.shape[0], scratch.d.shape[0]
    for i in range(first, min(first + slots, count)):
        slot = i % slots
        full = scratch.values_full.at[slot]
        plgpu.copy_gmem_to_smem(source.v.at[:, _slice(i)], scratch.v.at[slot], full)
        plgpu.copy_gmem_to_smem(source.s.at[_slice(i)], scratch.s.at[slot], full)


class _Sums(NamedTuple):
    """Sums over the slices of V."""

    dx: Array  # [C, K], its rows divided by scale
    scale: Array
    drs: Array  # dR S^T, [C, K]
    vdv: Array  # <v_i, dv_i>, [C]
    carried: Array  # its sum is <D, S> - <dR, K S>, [C]


def _through_values(tile: _Tile, source: _Sources) -> _Sums:
    """Sum over the slices of V; write dV."""
    static, scratch = {"interpret": tile.interpret}, tile.scratch
    count, slots = scratch.d.shape[0], scratch.v.shape[0]
    plgpu.barrier_wait(scratch.full)
    r, beta = by_row(tile.r, SLICE), by_row(tile.beta, SLICE)
    vdv = carried = plgpu.layout_cast(jnp.zeros((CHUNK,), f32), ROWS)
    dx: tuple[Array, Array] | None = None  # scaled rows, and the scales
    drs: Array | None = None
    written = []  # pending operands of dR S^T
    for i in range(count):
        v, s, d = scratch.v.at[i % slots], scratch.s.at[i % slots], scratch.d.at[i]
        d_scale = by_column(tile.row_scales(i, COLUMNS), CHUNK)
        plgpu.barrier_wait(scratch.values_full.at[i % slots])
        overlap = lambda i=i, s=s: _overlap(tile, s, i)
        yd, both = product((scratch.y, d.T), overlap_with=overlap, **static)
        dr = yd * beta * d_scale
        dv = r * dr
        values = load(v, WGMMA).astype(f32)
        vdv += (values * dv).sum(1)
        v[...] = dv.astype(bf16)  # in the layout in which V was read
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(v, source.dv.at[:, _slice(i)])
        ks, _ = product((scratch.k, s.T), **static)
        carried += both - (dr * ks).sum(1)
        residual = (r * values - tile.gamma * ks) * d_scale
        add = functools.partial(_add, dx, residual, d, tile.interpret)
        written.append((dr.astype(bf16), s))
        if i + 1 < count and i % slots + 1 < slots:
            dx = add()
            continue
        if drs is None:
            drs, dx = product(*written, overlap_with=add, **static)
        else:
            dx, drs = add(), accumulate(drs, *written, **static)
        written = []
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        warpgroup_barrier(tile.interpret)  # the slices' buffers are reused
        _fetch_slices(tile, source, i + 1)
    assert dx is not None and drs is not None
    return _Sums(*dx, drs, vdv, carried)


def _add(
    dx: tuple[Array, Array] | None, residual: Array, d: Any, interpret: Any
) -> tuple[Array, Array]:
    """Return dX + R D^T with scaled rows, and the scales."""
    scale = row_scales(residual)
    if dx is not None:
        scale = jnp.maximum(scale, dx[1])
    pair = (residual * by_row(1 / scale, SLICE)).astype(f16), d
    if dx is None:
        return product(pair, interpret=interpret)[0], scale
    kept = dx[0] * by_row(dx[1] / scale, dx[0].shape[1])
    return accumulate(kept, pair, interpret=interpret), scale


def _overlap(tile: _Tile, s: Any, i: int) -> Array:
    """Return <D, S> by rows of slice i, computed by halves to save registers."""
    total = plgpu.layout_cast(jnp.zeros((SLICE,), f32), ROWS)
    for start in range(0, s.shape[1], SLICE):
        columns = pl.ds(start, SLICE)
        d = load(tile.scratch.d.at[i, :, columns], WGMMA).astype(f32)
        total += (d * load(s.at[:, columns], WGMMA).astype(f32)).sum(1)
    return total * tile.row_scales(i, ROWS)


def _before(tile: _Tile, source: _Sources, i: int) -> Array:
    """Return slice i of the transposed cotangent before the chunk, float32."""
    scratch, scale = tile.scratch, tile.gamma * tile.row_scales(i, ROWS)
    d, beta = scratch.d.at[i], load(source.gates.at[1], COLUMNS, optimized=False)
    seen, _ = product((d, scratch.y.T), interpret=tile.interpret)
    dr = seen * by_row(-scale, CHUNK) * by_column(beta, SLICE)
    kept = load(d, WGMMA).astype(f32) * by_row(scale, d.shape[1])
    # Both parts: rounding errors of dR would remain, while those of D pass through the map.
    pairs = ((part, scratch.k) for part in split(dr))
    before = accumulate(kept, *pairs, interpret=tile.interpret)
    warpgroup_barrier(tile.interpret)  # all warps have read the slice
    return before


def _decay_gradient(tile: _Tile, sums: _Sums) -> Array:
    """Return dg: gamma times the sum of `carried`, plus <v, dv> of all earlier tokens."""
    rows = tile.scratch.rows
    store(rows.at[0], sums.vdv)
    store(rows.at[1], tile.gamma * sums.carried)
    warpgroup_barrier(tile.interpret)
    vdv, carried = (by_column(load(rows.at[i], COLUMNS, optimized=False), CHUNK) for i in (0, 1))
    return (carried + jnp.where(_below(), vdv, 0.0)).sum(1)


def _through_keys(tile: _Tile, source: _Sources, sums: _Sums) -> tuple[Array, Array]:
    """Return dbeta and dg; write dK."""
    static, scratch = {"interpret": tile.interpret}, tile.scratch
    plgpu.copy_gmem_to_smem(source.u, scratch.u, scratch.u_full)
    # Large values are consumed one after another to save registers.
    strengths = by_row(sums.scale * tile.beta, sums.dx.shape[1])
    scratch.high[...], scratch.low[...] = split(sums.dx * strengths)
    dbeta = sums.scale * (sums.dx * load(scratch.y, WGMMA).astype(f32)).sum(1)
    dg = _decay_gradient(tile, sums)
    plgpu.commit_smem()
    plgpu.barrier_wait(scratch.u_full)
    t_high, t_low = split(load_transposed(scratch.u).astype(f32))
    pairs = (t_low, scratch.high), (t_high, scratch.low), (t_high, scratch.high)
    square = lambda: product((scratch.k, scratch.k.T), **static)[0]
    z, gram = product(*pairs, overlap_with=square, **static)
    warpgroup_barrier(tile.interpret)  # the next matrices reuse this memory

    scratch.z[...], z_scale = scaled(z)
    store(scratch.z_scales, z_scale)
    dk = z - tile.gamma * sums.drs
    plgpu.commit_smem()
    yz, _ = product((scratch.y, scratch.z.T), **static)
    z_scale = by_column(load(scratch.z_scales, COLUMNS, optimized=False), CHUNK)
    p = jnp.where(_below(), -yz * z_scale, 0.0)
    dbeta += (p * gram).sum(1)
    q = (p * by_row(tile.beta, CHUNK)).astype(bf16)
    scratch.q[...] = q
    plgpu.commit_smem()
    dk = accumulate(dk, (q, scratch.k), (scratch.q.T, scratch.k), **static)
    scratch.dk[...] = dk.astype(bf16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch.dk, source.dk)
    return dbeta, dg


def _below() -> Array:
    """Return a mask that is true below the diagonal."""
    return iota(CHUNK, CHUNK, 1) < iota(CHUNK, CHUNK, 0)
