"""The sequential part: states carried from chunk to chunk, in slices of 64 rows of S^T.

With S^T in the registers of a warpgroup, a chunk is two products, both with their left operand in
registers:

    R^T = (V^T diag(r) - gamma S^T K^T) diag(beta)        S'^T = gamma S^T + R^T Y

Two programs that carry adjacent slices form a cluster: data that both read is fetched once for
both. Slices are the fastest axis of the grid, so that other programs find it in the L2 cache. Three
programs of `maps` fit a multiprocessor: they take at most 168 registers per thread and 75 kB of
shared memory.

Where keys are similar, the tokens of a chunk undo each other's writes, but their rounding errors
remain. So R and Y are float16, and a scale for each row of R^T gives them the range of bfloat16.
S^T is carried divided by these scales, because it is a sum of such products. Its rounding to
bfloat16 is the same for all tokens, and passes through the chunk as S^T itself does. A scale is a
bound that is known before its product: float16 has 16 binary orders above one in case the bound is
too low, and 14 below in case it is too high.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.gpu.segments import Segments, Walk, walk
from pallas_kernels.gated_delta.gpu.tiles import (
    CHUNK,
    COLUMNS,
    ROWS,
    SLICE,
    TINY,
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
    store,
    tiles,
    warpgroup_barrier,
)

_STAGES = 2  # chunks in shared memory at a time
_KEYS = 16.0  # |S k| of a key of length one is at most sqrt(128) times the largest entry of S
_LEAST = 2.0**-24  # relative to that bound: S / scale stays finite where nothing is written


def maps(
    k: Array,
    y: Array,
    v: Array,
    gates: Array,
    initial: Array,
    *,
    segments: Segments,
    weighted: bool,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """Return the maps S' = A S + B of all segments; a sequence's first has B = S' and no A.

    Args:
        k: [N, block, H, K] bfloat16.
        y: The same in float16.
        v: [N, block, H, V] bfloat16.
        gates: [N, H, chunks, 4, 64] float32.
        initial: S^T where a sequence begins, [B, H, V, K] float32.
        segments: The segments of a block.
        weighted: Whether y is diag(beta / largest beta) Y.
        interpret: As in Plan.

    Returns:
        diag(1 / scales) A^T, [N segments, H, K, K] float16, scales [N segments, H, K] float32, and
        B^T, [N segments, H, V, K] float32.
    """
    heads, key_dim, value_dim = *k.shape[2:], v.shape[3]
    value_slices, key_slices = value_dim // SLICE, key_dim // SLICE
    pair = _pair(value_slices, key_slices)
    count = segments.blocks * segments.count

    def body(k_ref, y_ref, v_ref, gates_ref, initial_ref, a_ref, scales_ref, b_ref, buffers):
        i, head = _slice(pair), lax.axis_index("head")
        chunks = walk(segments, lax.axis_index("segment"))
        place, opens = chunks.place, chunks.number == 0
        source = chunks, head, k_ref, y_ref, gates_ref, buffers

        # The order matters: the reverse takes more registers.
        @pl.when((i >= value_slices) & ~opens)
        def _transitions():
            first = (i - value_slices) * SLICE
            identity = iota(SLICE, key_dim, 0) + first == iota(SLICE, key_dim, 1)
            stream = _Stream(*source, weighted)
            s = _carry(jnp.where(identity, 1.0, 0.0), stream, interpret=interpret)
            matrix, scales = scaled(s)
            store(a_ref.at[place, head, pl.ds(first, SLICE)], matrix)
            store(scales_ref.at[place, head, pl.ds(first, SLICE)], scales)

        @pl.when(i < value_slices)
        def _values():
            rows = pl.ds(i * SLICE, SLICE)
            s = initial_ref.at[chunks.sequence, head, rows]
            s = jnp.where(opens, load(s, WGMMA, optimized=False), 0.0)
            stream = _Stream(*source, weighted, v_ref, i)
            store(b_ref.at[place, head, rows], _carry(s, stream, interpret=interpret))

    struct = lambda *shape, dtype: jax.ShapeDtypeStruct((count, heads, *shape), dtype)
    return kernel(
        "maps",
        body,
        grid={"segment": count, "head": heads, "slice": (value_slices + key_slices) // pair},
        cluster={"pair": pair},
        scratch=[_buffers(k, y)],
        out_type=[
            struct(key_dim, key_dim, dtype=f16),
            struct(key_dim, dtype=f32),
            struct(value_dim, key_dim, dtype=f32),
        ],
        interpret=interpret,
    )(k, y, v, gates, initial)


def chunk_states(
    k: Array,
    y: Array,
    v: Array,
    gates: Array,
    starts: Array,
    *,
    segments: Segments,
    interpret: Any,
) -> Array:
    """Return S^T before every chunk, [N, H, chunks, V, K] bfloat16.

    Arguments as for `maps`, and starts [B, n + 1, H, V, K] float32: S^T before each of the n
    segments of a sequence, and after the last.
    """
    heads, key_dim, value_dim = *k.shape[2:], v.shape[3]
    pair = _pair(value_dim // SLICE)

    def body(k_ref, y_ref, v_ref, gates_ref, starts_ref, out_ref, buffers, tile):
        i, head = _slice(pair), lax.axis_index("head")
        chunks = walk(segments, lax.axis_index("segment"))
        rows = pl.ds(i * SLICE, SLICE)

        def emit(chunk, s):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            warpgroup_barrier(interpret)
            tile[...] = s
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out_ref.at[chunks.block, head, chunk, rows])

        start = starts_ref.at[chunks.sequence, chunks.number, head, rows]
        start = load(start, WGMMA, optimized=False)
        stream = _Stream(chunks, head, k_ref, y_ref, gates_ref, buffers, False, v_ref, i)
        _carry(start, stream, emit=emit, interpret=interpret)
        plgpu.wait_smem_to_gmem(0)

    return kernel(
        "chunk_states",
        body,
        grid={
            "segment": segments.blocks * segments.count,
            "head": heads,
            "slice": value_dim // SLICE // pair,
        },
        cluster={"pair": pair},
        scratch=[_buffers(k, y), plgpu.SMEM((SLICE, key_dim), bf16, transforms=tiles())],
        out_type=jax.ShapeDtypeStruct(
            (segments.blocks, heads, segments.chunks, value_dim, key_dim), bf16
        ),
        interpret=interpret,
    )(k, y, v, gates, starts)


def _pair(*slices: int) -> int:
    """Return the programs in a cluster: two if all numbers of slices are even, else one."""
    return 1 if any(n % 2 for n in slices) else 2


def _slice(pair: int) -> Any:
    return pair * lax.axis_index("slice") + lax.axis_index("pair")


class _Buffers(NamedTuple):
    """Shared memory: _STAGES chunks of K, Y and gates, and one of V, which is read only once."""

    k: Any
    y: Any
    gates: Any
    full: Any
    consumed: Any
    values: Any
    values_full: Any


def _buffers(k: Array, y: Array) -> _Buffers:
    tile = lambda x: plgpu.SMEM((_STAGES, CHUNK, x.shape[-1]), x.dtype, transforms=tiles())
    return _Buffers(
        tile(k),
        tile(y),
        plgpu.SMEM((_STAGES, 4, CHUNK), f32),
        plgpu.Barrier(num_barriers=_STAGES, num_arrivals=3),
        plgpu.ClusterBarrier(num_barriers=_STAGES, collective_axes=("pair",)),
        plgpu.SMEM((CHUNK, SLICE), bf16, transforms=tiles()),
        plgpu.Barrier(),
    )


class _Stream(NamedTuple):
    """The source of a program's chunks; without values_ref there are no values."""

    chunks: Walk
    head: Any
    k_ref: Any
    y_ref: Any
    gates_ref: Any
    buffers: _Buffers
    weighted: bool  # whether Y includes beta
    values_ref: Any = None
    value_slice: Any = None

    def fetch(self, step: Any) -> None:
        """Start the copies of a step's K, Y and gates."""
        slot, chunk, b = lax.rem(step, _STAGES), self.chunks.at(step), self.buffers
        tokens = self._tokens(step)
        full = b.full.at[slot]
        share: dict[str, Any] = {"collective_axes": "pair"}
        plgpu.copy_gmem_to_smem(self.k_ref.at[tokens], b.k.at[slot], full, **share)
        plgpu.copy_gmem_to_smem(self.y_ref.at[tokens], b.y.at[slot], full, **share)
        gates = self.gates_ref.at[self.chunks.block, self.head, chunk]
        plgpu.copy_gmem_to_smem(gates, b.gates.at[slot], full)

    def fetch_values(self, step: Any) -> None:
        """Start the copy of a step's V, if there is such a step."""

        @pl.when(step < self.chunks.count)
        def _fetch():
            columns = pl.ds(self.value_slice * SLICE, SLICE)
            values = self.values_ref.at[(*self._tokens(step), columns)]
            plgpu.copy_gmem_to_smem(values, self.buffers.values, self.buffers.values_full)

    def read_values(self) -> Array:
        """Wait for V of a chunk and return V^T, bfloat16."""
        plgpu.barrier_wait(self.buffers.values_full)
        return load_transposed(self.buffers.values)

    def _tokens(self, step: Any) -> tuple[Any, ...]:
        return self.chunks.block, pl.ds(self.chunks.at(step) * CHUNK, CHUNK), self.head


def _carry(
    start: Array,
    stream: _Stream,
    *,
    interpret: Any,
    emit: Callable[[Any, Array], None] | None = None,
) -> Array:
    """Carry a slice of S^T through the chunks of a stream; call `emit` with it before each."""
    b, count = stream.buffers, stream.chunks.count
    for step in range(_STAGES):
        pl.when(step < count)(lambda step=step: stream.fetch(jnp.int32(step)))
    if stream.values_ref is not None:
        stream.fetch_values(jnp.int32(0))

    def advance(step: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        slot = lax.rem(step, _STAGES)
        if emit is not None:
            emit(stream.chunks.at(step), _unscaled(*carry).astype(bf16))
        plgpu.barrier_wait(b.full.at[slot])
        carry = _step(*carry, step, stream, interpret)
        warpgroup_barrier(interpret)  # the slot may be overwritten

        @pl.when(step + _STAGES < count)
        def _refill():
            plgpu.barrier_arrive(b.consumed.at[slot])
            plgpu.barrier_wait(b.consumed.at[slot])  # and those of the other program
            stream.fetch(step + _STAGES)

        return carry

    one = plgpu.layout_cast(jnp.ones((SLICE,), f32), ROWS)
    return _unscaled(*lax.fori_loop(0, count, advance, (start, one)))


def _unscaled(s: Array, scale: Array) -> Array:
    return s * by_row(scale, s.shape[1])


def _step(
    s: Array, scale: Array, step: Any, stream: _Stream, interpret: Any
) -> tuple[Array, Array]:
    """Return the scaled S^T after a chunk and its row scales, which bound R^T.

    S^T is passed and returned with its rows divided by their scales. Large values are consumed one
    after another to save registers.
    """
    b, slot = stream.buffers, lax.rem(step, _STAGES)
    gate = lambda i: by_column(load(b.gates.at[slot, i], COLUMNS), SLICE)
    gamma, strongest = b.gates[slot, 2, 0], b.gates[slot, 3, 0]
    operand = s.astype(bf16)
    pair = (operand, b.k.at[slot].T)
    seen, bound = product(
        pair, overlap_with=lambda: _KEYS * row_scales(operand) * scale, interpret=interpret
    )
    following, values = jnp.maximum(bound * _LEAST, TINY), None
    if stream.values_ref is not None:
        values = stream.read_values()
        bound = jnp.maximum(bound, row_scales(values))
    following = jnp.maximum(bound * strongest, following)
    weight = strongest if stream.weighted else 1.0
    scale = gamma * scale
    residual = seen * by_row(-scale, CHUNK)
    if values is not None:
        residual += values.astype(f32) * gate(0)
        warpgroup_barrier(interpret)  # all warps have read V
        stream.fetch_values(step + 1)
    if not stream.weighted:
        residual *= gate(1)
    residual = (residual * by_row(weight / following, CHUNK)).astype(f16)
    kept = s * by_row(scale / following, s.shape[1])
    s = accumulate(kept, (residual, b.y.at[slot]), interpret=interpret)
    return s, following
