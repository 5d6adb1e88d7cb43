"""What is sequential: states carried from chunk to chunk, in slices of 64 rows of S^T.

With S^T in the registers of a warpgroup a chunk is two products, both with their left operand in
registers:

    R^T = (V^T diag(r) - gamma S^T K^T) diag(beta)        S'^T = gamma S^T + R^T Y

Two programs that carry neighbouring slices form a cluster: what both read is fetched once for both.
Slices are the fastest axis of the grid, so that others find it in the L2 cache. Three programs of
`maps` fit a multiprocessor: they take no more than 168 registers a thread, 75 kB of shared memory.

Where keys are alike, the tokens of a chunk undo each other's writing, and their rounding errors
stay: R and Y are float16, with the range of bfloat16 by a size for each row of R^T. S^T is carried
divided by these sizes, as the sum of products that it is. Its rounding to bfloat16 is the same for
all tokens, and passes through the chunk as S^T itself does. A size is a bound that is known before
the product it serves: float16 has 16 binary orders above one for what a bound leaves out, and 14
below for what it overrates.
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
    join_warps,
    kernel,
    load,
    load_transposed,
    product,
    row_sizes,
    scaled,
    store,
    tiles,
)

_STAGES = 2  # chunks in shared memory at a time
_KEYS = 16.0  # |S k| of a key of length one is at most sqrt(128) times the largest entry of S
_LEAST = 2.0**-24  # of it: S divided by a size stays a number where nothing is written


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
    """The maps S' = A S + B of all segments; where a sequence begins, B is S' and A is not made.

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
        diag(1 / sizes) A^T, [N segments, H, K, K] float16, sizes [N segments, H, K] float32, and
        B^T, [N segments, H, V, K] float32.
    """
    heads, key_dim, value_dim = *k.shape[2:], v.shape[3]
    value_slices, key_slices = value_dim // SLICE, key_dim // SLICE
    pair = _pair(value_slices, key_slices)
    count = segments.blocks * segments.count

    def body(k_ref, y_ref, v_ref, gates_ref, initial_ref, a_ref, sizes_ref, b_ref, buffers):
        i, head = _slice(pair), lax.axis_index("head")
        chunks = walk(segments, lax.axis_index("segment"))
        place, opens = chunks.place, chunks.number == 0
        source = chunks, head, k_ref, y_ref, gates_ref, buffers

        # In this order: the other way round they take more registers.
        @pl.when((i >= value_slices) & ~opens)
        def _transitions():
            first = (i - value_slices) * SLICE
            identity = iota(SLICE, key_dim, 0) + first == iota(SLICE, key_dim, 1)
            stream = _Stream(*source, weighted)
            s = _carry(jnp.where(identity, 1.0, 0.0), stream, interpret=interpret)
            matrix, sizes = scaled(s)
            store(a_ref.at[place, head, pl.ds(first, SLICE)], matrix)
            store(sizes_ref.at[place, head, pl.ds(first, SLICE)], sizes)

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
    """S^T before every chunk, [N, H, chunks, V, K] bfloat16.

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
            join_warps(interpret)
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
    """Programs of a cluster: two, where slices of every kind come in pairs."""
    return 1 if any(n % 2 for n in slices) else 2


def _slice(pair: int) -> Any:
    return pair * lax.axis_index("slice") + lax.axis_index("pair")


class _Buffers(NamedTuple):
    """Shared memory: _STAGES chunks of K, Y and gates, and one of V, which is read but once."""

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
    """Where a program reads its chunks from; without values_ref there are no values."""

    chunks: Walk
    head: Any
    k_ref: Any
    y_ref: Any
    gates_ref: Any
    buffers: _Buffers
    weighted: bool  # whether Y holds beta
    values_ref: Any = None
    value_slice: Any = None

    def fetch(self, step: Any) -> None:
        """Starts the copies of a step's K, Y and gates."""
        slot, chunk, b = lax.rem(step, _STAGES), self.chunks.at(step), self.buffers
        tokens = self._tokens(step)
        full = b.full.at[slot]
        share: dict[str, Any] = {"collective_axes": "pair"}
        plgpu.copy_gmem_to_smem(self.k_ref.at[tokens], b.k.at[slot], full, **share)
        plgpu.copy_gmem_to_smem(self.y_ref.at[tokens], b.y.at[slot], full, **share)
        gates = self.gates_ref.at[self.chunks.block, self.head, chunk]
        plgpu.copy_gmem_to_smem(gates, b.gates.at[slot], full)

    def fetch_values(self, step: Any) -> None:
        """Starts the copy of a step's V, if there is such a step."""

        @pl.when(step < self.chunks.count)
        def _fetch():
            columns = pl.ds(self.value_slice * SLICE, SLICE)
            values = self.values_ref.at[(*self._tokens(step), columns)]
            plgpu.copy_gmem_to_smem(values, self.buffers.values, self.buffers.values_full)

    def read_values(self) -> Array:
        """V^T of a chunk, bfloat16."""
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
    """Carries a slice of S^T through the chunks of a stream; `emit` gets it before each."""
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
        join_warps(interpret)  # the slot is free

        @pl.when(step + _STAGES < count)
        def _refill():
            plgpu.barrier_arrive(b.consumed.at[slot])
            plgpu.barrier_wait(b.consumed.at[slot])  # and those of the other program
            stream.fetch(step + _STAGES)

        return carry

    one = plgpu.layout_cast(jnp.ones((SLICE,), f32), ROWS)
    return _unscaled(*lax.fori_loop(0, count, advance, (start, one)))


def _unscaled(s: Array, size: Array) -> Array:
    return s * by_row(size, s.shape[1])


def _step(s: Array, size: Array, step: Any, stream: _Stream, interpret: Any) -> tuple[Array, Array]:
    """S^T after a chunk, before and after divided by sizes of its rows; that after bounds R^T.

    What is large is used up in turn, for few registers.
    """
    b, slot = stream.buffers, lax.rem(step, _STAGES)
    gate = lambda i: by_column(load(b.gates.at[slot, i], COLUMNS), SLICE)
    gamma, strongest = b.gates[slot, 2, 0], b.gates[slot, 3, 0]
    operand = s.astype(bf16)
    pair = (operand, b.k.at[slot].T)
    seen, bound = product(
        pair, meanwhile=lambda: _KEYS * row_sizes(operand) * size, interpret=interpret
    )
    following, values = jnp.maximum(bound * _LEAST, TINY), None
    if stream.values_ref is not None:
        values = stream.read_values()
        bound = jnp.maximum(bound, row_sizes(values))
    following = jnp.maximum(bound * strongest, following)
    weight = strongest if stream.weighted else 1.0
    size = gamma * size
    residual = seen * by_row(-size, CHUNK)
    if values is not None:
        residual += values.astype(f32) * gate(0)
        join_warps(interpret)  # all have read V
        stream.fetch_values(step + 1)
    if not stream.weighted:
        residual *= gate(1)
    residual = (residual * by_row(weight / following, CHUNK)).astype(f16)
    kept = s * by_row(size / following, s.shape[1])
    s = accumulate(kept, (residual, b.y.at[slot]), interpret=interpret)
    return s, following
