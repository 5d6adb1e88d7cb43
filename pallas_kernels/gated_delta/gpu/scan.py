"""What is sequential: states carried from chunk to chunk, in slices of 64 rows of S^T.

With S^T in the registers of a warpgroup a chunk is two products, both with their left operand in
registers:

    R^T = (V^T diag(r) - gamma S^T K^T) diag(beta)        S'^T = gamma S^T + R^T Y

Cotangents of states run through the same two products, backwards, with K and Y exchanged and no V.
Two programs that carry neighbouring slices form a cluster: what both read is fetched once for both.
Slices are the fastest axis of the grid, so that others find it in the L2 cache.

Where keys are alike, the tokens of a chunk undo each other's writing, and their rounding errors
stay: R and Y are float16, with the range of bfloat16 by a scale for each row of R^T, and the
cotangents' second product takes both parts of its left operand. The rounding of S^T is the same for
all tokens, and passes through the chunk as S^T itself does. Scales are bounds that are known before
the product they serve: float16 has 16 binary orders above one for what a bound leaves out, and 14
below for what it overrates.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.gpu.tiles import (
    CHUNK,
    COLUMNS,
    SLICE,
    TINY,
    WGMMA,
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

STAGES = 2  # chunks in shared memory at a time; two programs fit a multiprocessor
_KEYS = 16.0  # |S k| of a key of length one is at most sqrt(128) times the largest entry of S


class Segments(NamedTuple):
    """How blocks are cut for walks side by side: into `each` chunks, the last into what is left."""

    each: int
    chunks: int  # of a block
    blocks: int  # of all sequences
    sequence: int  # blocks of a sequence

    @property
    def count(self) -> int:
        """Segments of a block."""
        return -(-self.chunks // self.each)


def maps(
    k: Array,
    y: Array,
    v: Array,
    gates: Array,
    initial: Array,
    *,
    segments: Segments,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """The maps S' = A S + B of all segments; where a sequence begins, B is S' and A is not made.

    Args:
        k: [N, block, H, K] bfloat16.
        y: The same in float16.
        v: [N, block, H, V] bfloat16.
        gates: [N, H, chunks, 4, 64] float32.
        initial: S^T where a sequence begins, [B, H, V, K] float32.
        segments: The segments of a block.
        interpret: As in Plan.

    Returns:
        diag(1 / sizes) A^T, [N segments, H, K, K] float16, sizes [N segments, H, K] float32, and
        B^T, [N segments, H, V, K] float32.
    """
    heads, key_dim, value_dim = *k.shape[2:], v.shape[3]
    value_slices, key_slices = value_dim // SLICE, key_dim // SLICE
    pair = _pair(value_slices, key_slices)

    def body(k_ref, y_ref, v_ref, gates_ref, initial_ref, a_ref, sizes_ref, b_ref, buffers):
        i, head = _slice(pair), lax.axis_index("head")
        chunks = _segment(segments)
        place, opens = chunks.place, chunks.opens_sequence

        @pl.when(i < value_slices)
        def _values():
            rows = pl.ds(i * SLICE, SLICE)
            s = initial_ref.at[lax.div(chunks.block, segments.sequence), head, rows]
            s = jnp.where(opens, load(s, WGMMA, optimized=False), 0.0)
            stream = _Stream(chunks, head, k_ref, y_ref, gates_ref, buffers, v_ref, i)
            store(b_ref.at[place, head, rows], _carry(s, stream, interpret=interpret))

        @pl.when((i >= value_slices) & ~opens)
        def _transitions():
            first = (i - value_slices) * SLICE
            identity = iota(SLICE, key_dim, 0) + first == iota(SLICE, key_dim, 1)
            stream = _Stream(chunks, head, k_ref, y_ref, gates_ref, buffers)
            s = _carry(jnp.where(identity, 1.0, 0.0), stream, interpret=interpret)
            matrix, sizes = scaled(s)
            store(a_ref.at[place, head, pl.ds(first, SLICE)], matrix)
            store(sizes_ref.at[place, head, pl.ds(first, SLICE)], sizes)

    count = segments.blocks * segments.count
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
    """S^T before every chunk, [N, H, chunks, V, K] bfloat16.

    Arguments as for `maps`, and starts [N segments, H, V, K] float32: S^T before every segment.
    """
    (states,) = _chunkwise((k, y, gates), starts, v, segments, interpret)
    return states


def chunk_cotangents(
    k: Array, y: Array, gates: Array, ends: Array, *, segments: Segments, interpret: Any
) -> tuple[Array, Array]:
    """The transposed cotangent of the state after every chunk, [N, H, chunks, V, K] bfloat16.

    Arguments as for `maps`, and ends [N segments, H, V, K] float32: that after every segment.
    Also returns that of the state where a sequence begins, [B, H, V, K] float32.
    """
    cotangents, first = _chunkwise((y, k, gates), ends, None, segments, interpret)
    return cotangents, first


def _chunkwise(
    streams: tuple[Array, Array, Array],
    starts: Array,
    v: Array | None,
    segments: Segments,
    interpret: Any,
) -> tuple[Array, ...]:
    first, second, _ = streams
    heads, key_dim, value_dim = *first.shape[2:], starts.shape[2]
    pair, backward = _pair(value_dim // SLICE), v is None

    def body(*refs):
        *refs, buffers, tile = refs
        first_ref, second_ref, gates_ref, starts_ref, *refs = refs
        v_ref = None if backward else refs.pop(0)
        out_ref, *last_ref = refs
        i, head = _slice(pair), lax.axis_index("head")
        chunks = _segment(segments)._replace(reverse=backward)
        rows = pl.ds(i * SLICE, SLICE)
        stream = _Stream(chunks, head, first_ref, second_ref, gates_ref, buffers, v_ref, i)

        def emit(chunk, s):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            join_warps(interpret)
            tile[...] = s
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out_ref.at[chunks.block, head, chunk, rows])

        start = load(starts_ref.at[chunks.place, head, rows], WGMMA, optimized=False)
        last = _carry(start, stream, emit=emit, interpret=interpret)
        if backward:
            place = lax.div(chunks.block, segments.sequence), head, rows
            pl.when(chunks.opens_sequence)(lambda: store(last_ref[0].at[place], last))
        plgpu.wait_smem_to_gmem(0)

    sequences = segments.blocks // segments.sequence
    shape = (segments.blocks, heads, segments.chunks, value_dim, key_dim)
    lasts = [jax.ShapeDtypeStruct((sequences, heads, value_dim, key_dim), f32)]
    return kernel(
        "chunk_cotangents" if backward else "chunk_states",
        body,
        grid={
            "segment": segments.blocks * segments.count,
            "head": heads,
            "slice": value_dim // SLICE // pair,
        },
        cluster={"pair": pair},
        scratch=[
            _buffers(first, second),
            plgpu.SMEM((SLICE, key_dim), bf16, transforms=tiles()),
        ],
        out_type=[jax.ShapeDtypeStruct(shape, bf16), *(lasts if backward else [])],
        interpret=interpret,
    )(*streams, starts, *([] if backward else [v]))


def _pair(*slices: int) -> int:
    """Programs of a cluster: two, where slices of every kind come in pairs."""
    return 1 if any(n % 2 for n in slices) else 2


def _slice(pair: int) -> Any:
    return pair * lax.axis_index("slice") + lax.axis_index("pair")


class _Chunks(NamedTuple):
    """The chunks of one segment, in the order in which they are walked."""

    place: Any  # among the segments of all blocks
    opens_sequence: Any
    block: Any
    first: Any
    count: Any
    reverse: bool = False

    def at(self, step: Any) -> Any:
        return self.first + (self.count - 1 - step if self.reverse else step)


def _segment(segments: Segments) -> _Chunks:
    """The segment of this program: the first, and longest, of all blocks, then the second."""
    i, each = lax.axis_index("segment"), segments.each
    block, segment = lax.rem(i, segments.blocks), lax.div(i, segments.blocks)
    return _Chunks(
        block * segments.count + segment,
        (segment == 0) & (lax.rem(block, segments.sequence) == 0),
        block,
        segment * each,
        jnp.minimum(each, segments.chunks - segment * each),
    )


class _Buffers(NamedTuple):
    """Shared memory: STAGES chunks of the matrices that S^T meets, of V and of gates."""

    first: Any
    second: Any
    values: Any
    gates: Any
    full: Any
    values_full: Any
    consumed: Any


def _buffers(first: Array, second: Array) -> _Buffers:
    tile = lambda x: plgpu.SMEM((STAGES, CHUNK, x.shape[-1]), x.dtype, transforms=tiles())
    return _Buffers(
        tile(first),
        tile(second),
        plgpu.SMEM((STAGES, CHUNK, SLICE), bf16, transforms=tiles()),
        plgpu.SMEM((STAGES, 4, CHUNK), f32),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=3),
        plgpu.Barrier(num_barriers=STAGES),
        plgpu.ClusterBarrier(num_barriers=STAGES, collective_axes=("pair",)),
    )


class _Stream(NamedTuple):
    """Where a program reads its chunks from; without values_ref there are no values."""

    chunks: _Chunks
    head: Any
    first_ref: Any
    second_ref: Any
    gates_ref: Any
    buffers: _Buffers
    values_ref: Any = None
    value_slice: Any = None

    def fetch(self, step: Any) -> None:
        """Starts the copies of a step's chunk."""
        slot, chunk, b = lax.rem(step, STAGES), self.chunks.at(step), self.buffers
        tokens = self.chunks.block, pl.ds(chunk * CHUNK, CHUNK), self.head
        full = b.full.at[slot]
        share: dict[str, Any] = {"collective_axes": "pair"}
        plgpu.copy_gmem_to_smem(self.first_ref.at[tokens], b.first.at[slot], full, **share)
        plgpu.copy_gmem_to_smem(self.second_ref.at[tokens], b.second.at[slot], full, **share)
        gates = self.gates_ref.at[self.chunks.block, self.head, chunk]
        plgpu.copy_gmem_to_smem(gates, b.gates.at[slot], full)
        if self.values_ref is not None:
            columns = pl.ds(self.value_slice * SLICE, SLICE)
            values = self.values_ref.at[(*tokens, columns)]
            plgpu.copy_gmem_to_smem(values, b.values.at[slot], b.values_full.at[slot])

    def read_values(self, slot: Any) -> Array:
        """V^T of a chunk, bfloat16."""
        plgpu.barrier_wait(self.buffers.values_full.at[slot])
        return load_transposed(self.buffers.values.at[slot])

    def read_gate(self, slot: Any, i: int) -> Array:
        """A gate of a chunk, a number a column."""
        return load(self.buffers.gates.at[slot, i], COLUMNS)


def _carry(
    start: Array,
    stream: _Stream,
    *,
    interpret: Any,
    emit: Callable[[Any, Array], None] | None = None,
) -> Array:
    """Carries a slice of S^T through the chunks of a stream; `emit` gets it before each."""
    b, count = stream.buffers, stream.chunks.count
    for step in range(STAGES):
        pl.when(step < count)(lambda step=step: stream.fetch(jnp.int32(step)))
    walk = _step_back if stream.chunks.reverse else _step

    def advance(step: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        slot = lax.rem(step, STAGES)
        if emit is not None:
            emit(stream.chunks.at(step), carry[0].astype(bf16))
        plgpu.barrier_wait(b.full.at[slot])
        carry = walk(*carry, slot, stream, interpret)
        join_warps(interpret)  # the slot is free

        @pl.when(step + STAGES < count)
        def _refill():
            plgpu.barrier_arrive(b.consumed.at[slot])
            plgpu.barrier_wait(b.consumed.at[slot])  # and those of the other program
            stream.fetch(step + STAGES)

        return carry

    return lax.fori_loop(0, count, advance, (start, row_sizes(start)))[0]


def _step(s: Array, _: Array, slot: Any, stream: _Stream, interpret: Any) -> tuple[Array, Array]:
    """S^T after a chunk. R^T is divided by a bound of its rows, found while S^T K^T is computed."""
    b = stream.buffers
    gamma, operand = b.gates[slot, 2, 0], s.astype(bf16)

    def meanwhile() -> tuple[Array, Array, Array]:
        size, beta = _KEYS * row_sizes(operand), stream.read_gate(slot, 1)
        values = zeros(SLICE, CHUNK)
        if stream.values_ref is not None:
            values = stream.read_values(slot)
            size = jnp.maximum(size, row_sizes(values))
            values = values.astype(f32) * by_column(stream.read_gate(slot, 0) * beta, SLICE)
        return values, gamma * beta, jnp.maximum(size * b.gates[slot, 3, 0], TINY)

    pair = (operand, b.first.at[slot].T)
    seen, (values, scale, size) = product(pair, meanwhile=meanwhile, interpret=interpret)
    residual = (values - seen * by_column(scale, SLICE)) * by_row(1 / size, CHUNK)
    written, kept = product(
        (residual.astype(f16), b.second.at[slot]),
        meanwhile=lambda: gamma * s,
        interpret=interpret,
    )
    return kept + written * by_row(size, s.shape[1]), size


def _step_back(
    d: Array, size: Array, slot: Any, stream: _Stream, interpret: Any
) -> tuple[Array, Array]:
    """The cotangent before a chunk, and the size of that after it, which bounds it."""
    b = stream.buffers
    gamma = b.gates[slot, 2, 0]
    operand = (d * by_row(1 / size, d.shape[1])).astype(f16)
    seen, following = product(
        (operand, b.first.at[slot].T),
        meanwhile=lambda: row_sizes(d.astype(bf16)),
        interpret=interpret,
    )
    beta = by_column(stream.read_gate(slot, 1), SLICE)
    parts = split(seen * by_row(-gamma * size, CHUNK) * beta)
    written, kept = product(
        *((part, b.second.at[slot]) for part in parts),
        meanwhile=lambda: gamma * d,
        interpret=interpret,
    )
    return kept + written, following
