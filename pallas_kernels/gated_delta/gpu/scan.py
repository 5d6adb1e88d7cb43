"""What is sequential: states carried from chunk to chunk, in slices of 64 rows of S^T.

With S^T in the registers of a warpgroup a chunk is two products, both with their left operand in
registers:

    R^T = (V^T diag(r) - gamma S^T K^T) diag(beta)        S'^T = gamma S^T + R^T Y

Cotangents of states run through the same two products, backwards, with K and Y exchanged and no V.
In a program one warpgroup copies chunks into shared memory, and one or two others carry a slice
each through them.

Where keys are alike, the tokens of a chunk undo each other's writing, and their rounding errors
stay: R and Y are float16, with the range of bfloat16 by a scale for each row of R^T, and the
cotangents' second product takes both parts of its left operand. The rounding of S^T is the same for
all tokens, and passes through the chunk as S^T itself does.
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
    WGMMA,
    bf16,
    by_column,
    f32,
    iota,
    kernel,
    load,
    load_transposed,
    product,
    scaled_product,
    split,
    store,
    tiles,
    zeros,
)

STAGES = 3  # chunks in shared memory at a time
_REGISTERS = (232, 40)  # a thread's, in warpgroups that compute and in the one that copies


def maps(
    k: Array, y: Array, v: Array, gates: Array, *, segments: int, interpret: Any
) -> tuple[Array, Array, Array]:
    """The maps S' = A S + B of all segments; a block is `segments` of them.

    Args:
        k: [N, block, H, K] bfloat16.
        y: The same in float16.
        v: [N, block, H, V] bfloat16.
        gates: [N, H, chunks, 3, 64] float32.
        segments: Segments of a block; the last may have fewer chunks, but none has none.
        interpret: As in Plan.

    Returns:
        High and low part of A^T, [N segments, H, K, K] bfloat16 each, and B^T,
        [N segments, H, V, K] float32.
    """
    blocks, _, heads, key_dim = k.shape
    value_dim = v.shape[-1]
    workers = _workers(value_dim, key_dim)
    value_groups, key_groups = (n // SLICE // workers for n in (value_dim, key_dim))

    def body(k_ref, y_ref, v_ref, gates_ref, high_ref, low_ref, b_ref, buffers):
        group, head, place = (lax.axis_index(name) for name in ("slices", "head", "segment"))
        chunks = _segment(place, segments, gates.shape[2])

        def values(worker: Any, stream: _Stream) -> None:
            rows = pl.ds((group * workers + worker) * SLICE, SLICE)
            s = _carry(zeros(SLICE, key_dim), worker, stream, interpret=interpret)
            store(b_ref.at[place, head, rows], s)

        def transitions(worker: Any, stream: _Stream) -> None:
            first = ((group - value_groups) * workers + worker) * SLICE
            identity = iota(SLICE, key_dim, 0) + first == iota(SLICE, key_dim, 1)
            s = jnp.where(identity, 1.0, 0.0)
            high, low = split(_carry(s, worker, stream, interpret=interpret))
            store(high_ref.at[place, head, pl.ds(first, SLICE)], high)
            store(low_ref.at[place, head, pl.ds(first, SLICE)], low)

        @pl.when(group < value_groups)
        def _values():
            stream = _Stream(chunks, head, k_ref, y_ref, gates_ref, buffers, v_ref, group)
            _run(values, stream, workers)

        @pl.when(group >= value_groups)
        def _transitions():
            _run(transitions, _Stream(chunks, head, k_ref, y_ref, gates_ref, buffers), workers)

    count = blocks * segments
    part = jax.ShapeDtypeStruct((count, heads, key_dim, key_dim), bf16)
    return kernel(
        "maps",
        body,
        grid={"slices": value_groups + key_groups, "head": heads, "segment": count},
        num_threads=workers + 1,
        thread_name="warpgroup",
        scratch=[_buffers(k, y, workers)],
        out_type=[part, part, jax.ShapeDtypeStruct((count, heads, value_dim, key_dim), f32)],
        interpret=interpret,
    )(k, y, v, gates)


def chunk_states(
    k: Array, y: Array, v: Array, gates: Array, starts: Array, *, segments: int, interpret: Any
) -> Array:
    """S^T before every chunk, [N, H, chunks, V, K] bfloat16.

    Arguments as for `maps`, and starts [N segments, H, V, K] float32: S^T before every segment.
    """
    return _chunkwise((k, y, gates), starts, v, segments, interpret)


def chunk_cotangents(
    k: Array, y: Array, gates: Array, ends: Array, *, segments: int, interpret: Any
) -> Array:
    """The transposed cotangent of the state after every chunk, [N, H, chunks, V, K] bfloat16.

    Arguments as for `maps`, and ends [N segments, H, V, K] float32: that after every segment.
    """
    return _chunkwise((y, k, gates), ends, None, segments, interpret)


def _chunkwise(
    inputs: tuple[Array, Array, Array],
    starts: Array,
    v: Array | None,
    segments: int,
    interpret: Any,
) -> Array:
    first, second, gates = inputs
    blocks, _, heads, key_dim = first.shape
    value_dim, count = starts.shape[2], gates.shape[2]
    workers = _workers(value_dim)

    def body(*refs):
        *refs, out_ref, buffers, tiles_out = refs
        first_ref, second_ref, gates_ref, starts_ref, *v_ref = refs
        group, head, place = (lax.axis_index(name) for name in ("slices", "head", "segment"))
        chunks = _segment(place, segments, count)._replace(reverse=v is None)
        streams = (first_ref, second_ref, gates_ref, buffers)
        stream = _Stream(chunks, head, *streams, *((*v_ref, group) if v_ref else ()))

        def work(worker: Any, stream: _Stream) -> None:
            rows = pl.ds((group * workers + worker) * SLICE, SLICE)
            tile = tiles_out.at[worker]

            def emit(chunk: Any, s: Array) -> None:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.commit_smem()
                tile[...] = s.astype(bf16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(tile, out_ref.at[chunks.block, head, chunk, rows])

            start = load(starts_ref.at[place, head, rows], WGMMA, optimized=False)
            _carry(start, worker, stream, emit=emit, interpret=interpret)
            plgpu.wait_smem_to_gmem(0)

        _run(work, stream, workers)

    return kernel(
        "chunk_cotangents" if v is None else "chunk_states",
        body,
        grid={"slices": value_dim // SLICE // workers, "head": heads, "segment": blocks * segments},
        num_threads=workers + 1,
        thread_name="warpgroup",
        scratch=[
            _buffers(first, second, workers),
            plgpu.SMEM((workers, SLICE, key_dim), bf16, transforms=tiles()),
        ],
        out_type=jax.ShapeDtypeStruct((blocks, heads, count, value_dim, key_dim), bf16),
        interpret=interpret,
    )(*inputs, starts, *([] if v is None else [v]))


class _Chunks(NamedTuple):
    """The chunks of one segment, in the order in which they are walked."""

    block: Any
    first: Any
    count: Any
    reverse: bool = False

    def at(self, step: Any) -> Any:
        return self.first + (self.count - 1 - step if self.reverse else step)


def _segment(place: Any, segments: int, chunks: int) -> _Chunks:
    each = -(-chunks // segments)
    first = lax.rem(place, segments) * each
    return _Chunks(lax.div(place, segments), first, jnp.minimum(each, chunks - first))


def _workers(*sizes: int) -> int:
    """Warpgroups of a program that carry a slice: two, where slices of every kind come in pairs."""
    return 1 if any(size // SLICE % 2 for size in sizes) else 2


class _Buffers(NamedTuple):
    """Shared memory: STAGES chunks of the matrices that meet S^T first and second, of V, of gates."""

    first: Any
    second: Any
    values: Any
    gates: Any
    full: Any
    values_full: Any
    consumed: Any


def _buffers(first: Array, second: Array, workers: int) -> _Buffers:
    tile = lambda *shape, dtype: plgpu.SMEM((STAGES, *shape), dtype, transforms=tiles())
    key_dim = first.shape[-1]
    return _Buffers(
        tile(CHUNK, key_dim, dtype=first.dtype),
        tile(CHUNK, key_dim, dtype=second.dtype),
        tile(workers, CHUNK, SLICE, dtype=bf16),
        plgpu.SMEM((STAGES, 3, CHUNK), f32),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=3),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=workers),
        plgpu.Barrier(num_barriers=STAGES, num_arrivals=workers),
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
    group: Any = None

    def fetch(self, step: Any, workers: int) -> None:
        """Starts the copies of a step's chunk."""
        slot, chunk, b = lax.rem(step, STAGES), self.chunks.at(step), self.buffers
        tile = (self.chunks.block, pl.ds(chunk * CHUNK, CHUNK), self.head)
        full = b.full.at[slot]
        plgpu.copy_gmem_to_smem(self.first_ref.at[tile], b.first.at[slot], full)
        plgpu.copy_gmem_to_smem(self.second_ref.at[tile], b.second.at[slot], full)
        gates = self.gates_ref.at[self.chunks.block, self.head, chunk]
        plgpu.copy_gmem_to_smem(gates, b.gates.at[slot], full)
        if self.values_ref is None:
            return
        for worker in range(workers):
            columns = pl.ds((self.group * workers + worker) * SLICE, SLICE)
            values = self.values_ref.at[(*tile, columns)]
            plgpu.copy_gmem_to_smem(values, b.values.at[slot, worker], b.values_full.at[slot])


def _run(work: Callable[[Any, _Stream], None], stream: _Stream, workers: int) -> None:
    """Runs `work` in the warpgroups that carry slices, and the copies for them in the last one."""
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < workers)
    def _compute():
        plgpu.set_max_registers(_REGISTERS[0], action="increase")
        work(warpgroup, stream)

    @pl.when(warpgroup == workers)
    def _copy():
        plgpu.set_max_registers(_REGISTERS[1], action="decrease")

        count = stream.chunks.count
        pl.loop(0, jnp.minimum(count, STAGES))(lambda step: stream.fetch(step, workers))

        @pl.loop(STAGES, jnp.maximum(count, STAGES))
        def _refill(step):
            plgpu.barrier_wait(stream.buffers.consumed.at[lax.rem(step, STAGES)])
            stream.fetch(step, workers)


def _carry(
    start: Array,
    worker: Any,
    stream: _Stream,
    *,
    interpret: Any,
    emit: Callable[[Any, Array], None] | None = None,
) -> Array:
    """Carries a slice of S^T through the chunks of a stream; `emit` gets it before each."""
    b, static = stream.buffers, {"interpret": interpret}

    def advance(step: Any, s: Array) -> Array:
        slot = lax.rem(step, STAGES)
        if emit is not None:
            emit(stream.chunks.at(step), s)
        plgpu.barrier_wait(b.full.at[slot])
        gamma = b.gates[slot, 2, 0]
        beta = by_column(load(b.gates.at[slot, 1], COLUMNS), SLICE)

        def decayed() -> Array:
            plgpu.commit_smem()  # gates and values are read; the second product overlaps
            return gamma * s

        if stream.chunks.reverse:
            seen, _ = scaled_product(s, b.first.at[slot].T, **static)
            parts = split(seen * (-gamma * beta))
            pairs = ((part, b.second.at[slot]) for part in parts)
            written, kept = product(*pairs, meanwhile=decayed, **static)
        else:
            values = lambda: _values(b, slot, worker, stream.values_ref is not None)
            pair = (s.astype(bf16), b.first.at[slot].T)
            seen, brought = product(pair, meanwhile=values, **static)
            residual = (brought - gamma * seen) * beta
            written, kept = scaled_product(
                residual, b.second.at[slot], meanwhile=decayed, **static
            )
        plgpu.barrier_arrive(b.consumed.at[slot])
        return kept + written

    return lax.fori_loop(0, stream.chunks.count, advance, start)


def _values(b: _Buffers, slot: Any, worker: Any, present: bool) -> Array:
    """V^T diag(r) of a worker's slice, or zeros."""
    if not present:
        return zeros(SLICE, CHUNK)
    plgpu.barrier_wait(b.values_full.at[slot])
    r = by_column(load(b.gates.at[slot, 0], COLUMNS), SLICE)
    return load_transposed(b.values.at[slot, worker]).astype(f32) * r
