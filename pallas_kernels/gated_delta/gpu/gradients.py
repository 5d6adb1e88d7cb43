"""Gradients of all tokens, from the states before chunks and the cotangents after segments.

A program walks a segment backwards. The cotangent D^T stays in shared memory, in float16 with a
size for each of its rows; at every chunk it gives the gradients of the chunk's tokens and becomes
the cotangent before the chunk.
"""

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
    join_warps,
    kernel,
    load,
    load_transposed,
    product,
    row_sizes,
    scaled,
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
    ends: Array,
    *,
    segments: Segments,
    interpret: Any,
) -> tuple[Array, Array, Array, Array]:
    """dK, dV, dbeta and dg of every token, and the cotangent of the initial state.

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
        ends: D^T after every segment, [N segments, H, V, K] float32.
        segments: The segments of a block.
        interpret: As in Plan.

    Returns:
        dK and dV in shape and dtype of k and v; dbeta and dg, [N, H, chunks, 2, 64] float32; and
        the transposed cotangent of the state where a sequence begins, [B, H, V, K] float32.
    """
    heads, key_dim, value_dim = *k.shape[2:], v.shape[3]
    sequences, chunks = segments.blocks // segments.sequence, segments.chunks

    def body(*refs):
        k_ref, y_ref, u_ref, v_ref, gates_ref, s_ref, ends_ref = refs[:7]
        dk_ref, dv_ref, rows_ref, first_ref, sizes_ref, k_tiles, y_tiles, d_tiles, *fulls = refs[7:]
        full, values_full, u_full = fulls
        head = lax.axis_index("head")
        chunks = walk(segments, lax.axis_index("segment"), reverse=True)
        d = _Cotangent(d_tiles, sizes_ref.at[chunks.place, head], 0)
        sequence = lax.div(chunks.block, segments.sequence)
        for i, rows in enumerate(d.slices):
            d.put(i, load(ends_ref.at[chunks.place, head, rows], WGMMA, optimized=False))

        def advance(step: Any, slot: Any) -> Any:
            chunk = chunks.at(step)
            k_tile, y_tile = k_tiles.at[slot], y_tiles.at[slot]
            d = _Cotangent(d_tiles, sizes_ref.at[chunks.place, head], slot)
            tokens = chunks.block, pl.ds(chunk * CHUNK, CHUNK), head
            entry = chunks.block, head, chunk
            plgpu.copy_gmem_to_smem(k_ref.at[tokens], k_tile, full)
            plgpu.copy_gmem_to_smem(y_ref.at[tokens], y_tile, full)
            tile = _Tile.of(k_tile, y_tile, gates_ref.at[entry], interpret)

            def by_values(*tiles: Any) -> _Sums:
                refs = v_ref.at[tokens], s_ref.at[entry], dv_ref.at[tokens]
                return _through_values(tile, _Slices(*refs, *tiles, values_full, slot), d, full)

            slot2 = (tile.gamma < -1).astype(jnp.int32)
            slot3 = (tile.gamma < -2).astype(jnp.int32)

            def by_keys(*tiles: Any) -> None:
                tiles = [t.at[slot2] for t in tiles]
                tile2 = tile._replace(k=k_tiles.at[slot2], y=y_tiles.at[slot2])
                tile3 = tile._replace(k=k_tiles.at[slot3], y=y_tiles.at[slot3])
                d3 = d._replace(slot=slot3)
                dk, dbeta, dg = _through_keys(tile2, u_ref.at[entry], u_full, sums, slot2, *tiles)
                out = tiles[0]
                join_warps(interpret)  # nobody needs what is in it
                out[...] = dk.astype(bf16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(out, dk_ref.at[tokens])
                store(rows_ref.at[(*entry, 0)], dbeta)
                store(rows_ref.at[(*entry, 1)], dg)
                opens = chunks.opens_sequence & (step + 1 == chunks.count)
                for i, rows in enumerate(d.slices):
                    before = _before(tile3, d3, i)
                    pl.when(opens)(lambda: store(first_ref.at[sequence, head, rows], before))
                    d3.put(i, before)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                join_warps(interpret)

            sums = pl.run_scoped(by_values, *_Slices.scratch(key_dim, value_dim))
            part = plgpu.SMEM((1, CHUNK, key_dim), bf16, transforms=tiles())
            pl.run_scoped(by_keys, part)
            return (tile.gamma < 0).astype(jnp.int32)

        lax.fori_loop(0, chunks.count, advance, jnp.int32(0))

    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    return kernel(
        "gradients",
        body,
        grid={"segment": segments.blocks * segments.count, "head": heads},
        scratch=[
            plgpu.SMEM((1, CHUNK, key_dim), bf16, transforms=tiles()),
            plgpu.SMEM((1, CHUNK, key_dim), f16, transforms=tiles()),
            plgpu.SMEM((value_dim // SLICE, SLICE, key_dim), f16, transforms=tiles()),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_barriers=_slots(value_dim), num_arrivals=2),
            plgpu.Barrier(),
        ],
        out_type=[
            like(k),
            like(v),
            jax.ShapeDtypeStruct((segments.blocks, heads, chunks, 2, CHUNK), f32),
            jax.ShapeDtypeStruct((sequences, heads, value_dim, key_dim), f32),
            jax.ShapeDtypeStruct((len(ends), heads, value_dim // SLICE, SLICE), f32),
        ],
        interpret=interpret,
    )(k, y, u, v, gates, states, ends)[:4]


class _Tile(NamedTuple):
    """A chunk's K and Y in shared memory, and its gates."""

    k: Any
    y: Any
    r: Array  # a number a row, as beta
    beta: Array
    gates: Any
    gamma: Array
    interpret: Any

    @staticmethod
    def of(k: Any, y: Any, gates: Any, interpret: Any) -> "_Tile":
        """Reads the gates from device memory."""
        r, beta = (load(gates.at[i], ROWS, optimized=False) for i in (0, 1))
        return _Tile(k, y, r, beta, gates, gates[2, 0], interpret)


class _Cotangent(NamedTuple):
    """D^T, its rows divided by their sizes, in slices."""

    tiles: Any  # [slices, SLICE, K] float16, in shared memory
    sizes: Any  # [slices, SLICE] float32, in device memory: shared memory is full
    slot: Any

    def tile(self, i: int) -> Any:
        return self.tiles.at[self.slot + i]

    @property
    def slices(self) -> list[Any]:
        """The rows of D^T in each slice."""
        return [pl.ds(i * SLICE, SLICE) for i in range(self.tiles.shape[0])]

    def put(self, i: int, d: Array) -> None:
        """Writes slice i, for products; what is in it must have been read."""
        self.tiles[self.slot + i], sizes = scaled(d)
        store(self.sizes.at[i], sizes)
        plgpu.commit_smem()

    def size(self, i: int, layout: Any) -> Array:
        return load(self.sizes.at[i], layout, optimized=False)


def _slots(value_dim: int) -> int:
    """Slices of V in shared memory: as many as let two programs fit a multiprocessor."""
    return min(2, value_dim // SLICE)


class _Slices(NamedTuple):
    """Slices of V and of the rows of S^T: where they come from, and where those of dV go."""

    v_ref: Any
    s_ref: Any
    dv_ref: Any
    v: Any
    s: Any
    full: Any
    slot: Any

    @staticmethod
    def scratch(key_dim: int, value_dim: int) -> list[Any]:
        tile = lambda rows, columns: plgpu.SMEM(
            (_slots(value_dim), rows, columns), bf16, transforms=tiles()
        )
        return [tile(CHUNK, SLICE), tile(SLICE, key_dim)]

    def fetch(self, i: int) -> None:
        """Starts the copies of slice i."""
        slot, part = i % self.v.shape[0], pl.ds(i * SLICE, SLICE)
        full = self.full.at[slot]
        plgpu.copy_gmem_to_smem(self.v_ref.at[:, part], self.v.at[self.slot + slot], full)
        plgpu.copy_gmem_to_smem(self.s_ref.at[part], self.s.at[self.slot + slot], full)

    def emit(self, i: int, dv: Array) -> None:
        """Writes a slice of dV, from the place of that of V, which has the same layout."""
        tile = self.v.at[self.slot + i % self.v.shape[0]]
        tile[...] = dv.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, self.dv_ref.at[:, pl.ds(i * SLICE, SLICE)])


class _Sums(NamedTuple):
    """What the slices of V add up to."""

    dx: Array  # [C, K]
    drs: Array  # dR S^T, [C, K]
    vdv: Array  # <v_i, dv_i>, [C]
    carried: Array  # its sum is <D, S> - <dR, K S>, [C]


def _through_values(tile: _Tile, slices: _Slices, d: _Cotangent, full: Any) -> _Sums:
    """Sums over the slices of V; writes dV."""
    static = {"interpret": tile.interpret}
    count, slots = len(d.slices), slices.v.shape[0]
    for i in range(slots):
        slices.fetch(i)
    plgpu.barrier_wait(full)
    r, beta = by_row(tile.r, SLICE), by_row(tile.beta, SLICE)
    vdv = carried = plgpu.layout_cast(jnp.zeros((CHUNK,), f32), ROWS)
    size = vdv  # of the rows of dx
    drs, pairs = None, []
    for i in range(count):
        v_tile, s_tile, d_tile = slices.v.at[slices.slot + i % slots], slices.s.at[slices.slot + i % slots], d.tile(i)
        d_size = by_column(d.size(i, COLUMNS), CHUNK)
        plgpu.barrier_wait(slices.full.at[i % slots])
        overlap = lambda i=i, s=s_tile: _overlap(s, d, i)
        yd, both = product((tile.y, d_tile.T), meanwhile=overlap, **static)
        dr = yd * beta * d_size
        dv = r * dr
        v = load(v_tile, WGMMA).astype(f32)
        vdv += (v * dv).sum(1)
        slices.emit(i, dv)
        ks, _ = product((tile.k, s_tile.T), **static)
        carried += both - (dr * ks).sum(1)
        residual = (r * v - tile.gamma * ks) * d_size
        following = row_sizes(residual)
        if i:
            following = jnp.maximum(size, following)
        pair = (residual * by_row(1 / following, SLICE)).astype(f16), d_tile
        if i:
            dx = accumulate(dx * by_row(size / following, dx.shape[1]), pair, **static)
        else:
            dx, _ = product(pair, **static)
        size = following
        pairs.append((dr.astype(bf16), s_tile))
        if i + 1 == count or i % slots == slots - 1:
            drs = product(*pairs, **static)[0] if drs is None else accumulate(drs, *pairs, **static)
            pairs = []
            if i + 1 < count:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                join_warps(tile.interpret)  # the slice is free
                for j in range(i + 1, min(i + 1 + slots, count)):
                    slices.fetch(j)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    join_warps(tile.interpret)  # the space of the slices serves anew
    return _Sums(dx * by_row(size, dx.shape[1]), drs, vdv, carried)


def _overlap(s: Any, d: _Cotangent, i: int) -> Array:
    """<D, S> by rows of slice i."""
    total = 0.0
    for start in range(0, s.shape[1], 64):
        c = pl.ds(start, 64)
        total += (load(d.tile(i).at[:, c], WGMMA).astype(f32) * load(s.at[:, c], WGMMA).astype(f32)).sum(1)
    return total * d.size(i, ROWS)


def _before(tile: _Tile, d: _Cotangent, i: int) -> Array:
    """Slice i of the cotangent before a chunk, float32."""
    d_tile, size = d.tile(i), tile.gamma * d.size(i, ROWS)
    seen, _ = product((d_tile, tile.y.T), interpret=tile.interpret)
    dr = seen * by_row(-size, CHUNK) * by_column(load(tile.gates.at[1], COLUMNS, optimized=False), SLICE)
    kept = load(d_tile, WGMMA).astype(f32) * by_row(size, d_tile.shape[1])
    pairs = ((part, tile.k) for part in split(dr))
    before = accumulate(kept, *pairs, interpret=tile.interpret)
    join_warps(tile.interpret)  # all have read the slice
    return before


def _decay_gradient(sums: _Sums, gamma: Array, scratch: Any, interpret: Any) -> Array:
    """dg: gamma times all of `carried`, and <v, dv> of the tokens before each."""
    store(scratch.at[0], sums.vdv)
    store(scratch.at[1], gamma * sums.carried)
    join_warps(interpret)
    vdv, carried = (by_column(load(scratch.at[i], COLUMNS, optimized=False), CHUNK) for i in (0, 1))
    return (carried + jnp.where(_below(), vdv, 0.0)).sum(1)


def _through_keys(
    tile: _Tile, u_ref: Any, u_full: Any, sums: _Sums, slot: Any, high_tile: Any
) -> tuple[Array, Array, Array]:
    """dK [C, K], dbeta and dg."""
    static, beta = {"interpret": tile.interpret}, tile.beta

    def by_inverse(low_tile: Any, u_tile: Any, rows: Any) -> tuple[Array, Array, Array]:
        low_tile, u_tile, rows = low_tile.at[slot], u_tile.at[slot], rows.at[slot]
        plgpu.copy_gmem_to_smem(u_ref, u_tile, u_full)
        # What is large is used up in turn: registers are short.
        high_tile[...], low_tile[...] = split(sums.dx * by_row(beta, sums.dx.shape[1]))
        dbeta = (sums.dx * load(tile.y, WGMMA).astype(f32)).sum(1)
        dg = _decay_gradient(sums, tile.gamma, rows, tile.interpret)
        plgpu.commit_smem()
        plgpu.barrier_wait(u_full)
        t_high, t_low = split(load_transposed(u_tile).astype(f32))
        pairs = (t_low, high_tile), (t_high, low_tile), (t_high, high_tile)
        z, _ = product(*pairs, **static)
        join_warps(tile.interpret)  # nobody needs diag(beta) dX and U
        return z, dbeta, dg

    part = lambda dtype: plgpu.SMEM((1, *tile.k.shape), dtype, transforms=tiles())
    square = lambda dtype: plgpu.SMEM((1, CHUNK, CHUNK), dtype, transforms=tiles())
    z, dbeta, dg = pl.run_scoped(by_inverse, part(bf16), square(f16), plgpu.SMEM((1, 2, CHUNK), f32))
    dk = z - tile.gamma * sums.drs
    def yzs(z_tile, sizes):
        z_tile, sizes = z_tile.at[slot], sizes.at[slot]
        z_tile[...], size = scaled(z)
        store(sizes, size)
        plgpu.commit_smem()
        yz, _ = product((tile.y, z_tile.T), **static)
        return yz * by_column(load(sizes, COLUMNS, optimized=False), CHUNK)
    yz = pl.run_scoped(yzs, part(f16), plgpu.SMEM((1, CHUNK), f32))
    p = jnp.where(_below(), -yz, 0.0)
    gram, _ = product((tile.k, tile.k.T), **static)
    dbeta += (p * gram).sum(1)
    q = (p * by_row(beta, CHUNK)).astype(bf16)

    def by_pairs(q_tile: Any) -> Array:
        q_tile = q_tile.at[slot]
        q_tile[...] = q
        plgpu.commit_smem()
        return accumulate(dk, (q, tile.k), (q_tile.T, tile.k), **static)

    return pl.run_scoped(by_pairs, square(bf16)), dbeta, dg


def _below() -> Array:
    """Where a column stands before its row."""
    return iota(CHUNK, CHUNK, 1) < iota(CHUNK, CHUNK, 0)
