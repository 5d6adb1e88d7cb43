"""Maps of segments folded in order: the states between them, and backwards their cotangents.

Few programs take one step after the other: what counts is how long a step takes. A program carries
a slice of 64 rows of X = S^T or D^T, each of its warpgroups 64 columns of them. The parts of X meet
in shared memory, in float16 with sizes of their rows. As matrices have sizes too, a product has a
relative error near 3e-4, below that of the matrix.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.gpu.tiles import (
    COLUMNS,
    ROWS,
    SLICE,
    WGMMA,
    by_column,
    by_row,
    f16,
    f32,
    join_warps,
    kernel,
    load,
    load_transposed_numbers,
    product,
    scaled,
    store,
    store_transposed,
    tiles,
    zeros,
)

_STAGES = 3


def fold(
    matrices: Array,
    sizes: Array,
    added: Array,
    initial: Array,
    *,
    blocks: int,
    keep_starts: bool,
    interpret: Any,
) -> tuple[Array, ...]:
    """States from segment to segment: X_{i+1} = X_i A_i^T + B_i^T.

    Args:
        matrices: diag(1 / sizes) A^T, [B, n, H, K, K] float16; the first is not read.
        sizes: [B, n, H, K] float32.
        added: S^T after the first segment and B^T of the others, [B, n, H, V, K] float32.
        initial: S before the first segment, [B, H, K, V] float32.
        blocks: Blocks of a sequence, of as many segments each.
        keep_starts: Whether to return the states before segments.
        interpret: As in Plan.

    Returns:
        S at the boundaries of blocks, [B, blocks + 1, H, K, V] float32; if asked for, S^T before
        each segment, [B, n, H, V, K] float32.
    """
    batch, count, heads, value_dim, key_dim = added.shape
    team, every = key_dim // SLICE, count // blocks

    def body(m_ref, sizes_ref, added_ref, initial_ref, states_ref, *refs):
        *starts_refs, scratch, added_tiles, added_full = refs
        maps = _Maps(_Program.of(team), m_ref, sizes_ref, _Scratch(*scratch), False, interpret)
        program = maps.program
        here = lambda ref, i: ref.at[program.batch, i, program.head, program.rows, program.columns]

        def emit(i: Any, x: Array) -> None:
            """Writes X_i if a block begins with it, or the last ends."""

            @pl.when(lax.rem(i, every) == 0)
            def _boundary():
                place = program.batch, lax.div(i, every), program.head
                store_transposed(states_ref.at[(*place, program.columns, program.rows)], x)

        def fetch(step: Any) -> None:
            slot = program.slot(step)
            maps.fetch(step + 1, slot)
            source = here(added_ref, step + 1)
            plgpu.copy_gmem_to_smem(source, added_tiles.at[slot], added_full.at[slot])

        for step in range(min(_STAGES, count - 1)):
            fetch(jnp.int32(step))
        place = program.batch, program.head, program.columns, program.rows
        initial = load_transposed_numbers(initial_ref.at[place])
        first = load(here(added_ref, 0), WGMMA, optimized=False)
        emit(jnp.int32(0), initial)
        emit(jnp.int32(1), first)
        for ref in starts_refs:
            store(here(ref, 0), initial)
            if count > 1:
                store(here(ref, 1), first)

        def advance(step: Any, x: Array) -> Array:
            slot, tile = program.slot(step), added_tiles.at[program.slot(step)]
            x, size = maps.apply(slot, lambda size: x * size)
            plgpu.barrier_wait(added_full.at[slot])
            x += load(tile, WGMMA)
            emit(step + 2, x)
            if starts_refs:
                tile[...] = x  # in the layout in which it was read
                plgpu.commit_smem()

                @pl.when(step + 2 < count)
                def _start():
                    plgpu.copy_smem_to_gmem(tile, here(starts_refs[0], step + 2))

            @pl.when((step > 0) & (step - 1 + _STAGES < count - 1))
            def _refill():
                if starts_refs:
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # that of the step before
                fetch(step - 1 + _STAGES)

            return x

        lax.fori_loop(0, count - 1, advance, first)
        plgpu.wait_smem_to_gmem(0)

    states = jax.ShapeDtypeStruct((batch, blocks + 1, heads, key_dim, value_dim), f32)
    starts = jax.ShapeDtypeStruct(added.shape, f32)
    slots = team * _STAGES
    return kernel(
        "fold",
        body,
        grid={"slice": value_dim // SLICE, "head": heads, "batch": batch},
        warpgroups=team,
        scratch=[
            _Scratch.types(key_dim, (key_dim, SLICE)),
            plgpu.SMEM((slots, SLICE, SLICE), f32, transforms=tiles(32, itemsize=4)),
            plgpu.Barrier(num_barriers=slots),
        ],
        out_type=[states, *([starts] if keep_starts else [])],
        interpret=interpret,
    )(matrices, sizes, added, initial)


def fold_back(matrices: Array, sizes: Array, dstates: Array, *, interpret: Any) -> Array:
    """Cotangents from segment to segment: X_i = X_{i+1} A_i, and that of a state where a block ends.

    Args:
        matrices, sizes: As for `fold`.
        dstates: Cotangents of S at the boundaries of blocks, [B, blocks + 1, H, K, V] float32; the
            first is not read.
        interpret: As in Plan.

    Returns:
        D^T after each segment, [B, n, H, V, K] float32.
    """
    batch, count, heads, key_dim = sizes.shape
    blocks, value_dim = dstates.shape[1] - 1, dstates.shape[4]
    team, every = key_dim // SLICE, count // blocks

    def body(m_ref, sizes_ref, dstates_ref, ends_ref, scratch, end_tiles):
        maps = _Maps(_Program.of(team), m_ref, sizes_ref, _Scratch(*scratch), True, interpret)
        program = maps.program
        fetch = lambda step: maps.fetch(count - 1 - step, program.slot(step))
        for step in range(min(_STAGES, count - 1)):
            fetch(jnp.int32(step))

        def added(i: Any) -> Array:
            place = program.batch, lax.div(i, every), program.head
            source = dstates_ref.at[(*place, program.columns, program.rows)]
            return load_transposed_numbers(source)

        def emit(i: Any, x: Array) -> None:
            """Writes X_i, which is the cotangent after segment i - 1."""
            tile = end_tiles.at[2 * program.warpgroup + lax.rem(i, 2)]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            join_warps(interpret)
            tile[...] = x
            plgpu.commit_smem()
            place = program.batch, i - 1, program.head, program.rows, program.columns
            plgpu.copy_smem_to_gmem(tile, ends_ref.at[place])

        def advance(step: Any, x: Array) -> Array:
            i = count - 1 - step
            boundary = lax.rem(i, every) == 0
            more = lambda: lax.cond(boundary, lambda: added(i), lambda: zeros(SLICE, SLICE))
            x, size, new = maps.apply(program.slot(step), lambda size: x, more)
            x = x * size + new
            emit(i, x)
            pl.when((step > 0) & (step - 1 + _STAGES < count - 1))(
                lambda: fetch(step - 1 + _STAGES)
            )
            return x

        last = added(jnp.int32(count))
        emit(jnp.int32(count), last)
        lax.fori_loop(0, count - 1, advance, last)
        plgpu.wait_smem_to_gmem(0)

    return kernel(
        "fold_back",
        body,
        grid={"slice": value_dim // SLICE, "head": heads, "batch": batch},
        warpgroups=team,
        scratch=[
            _Scratch.types(key_dim, (SLICE, key_dim)),
            plgpu.SMEM((2 * team, SLICE, SLICE), f32, transforms=tiles(32, itemsize=4)),
        ],
        out_type=jax.ShapeDtypeStruct((batch, count, heads, value_dim, key_dim), f32),
        interpret=interpret,
    )(matrices, sizes, dstates)


class _Program(NamedTuple):
    """The part of X of a warpgroup."""

    batch: Any
    head: Any
    warpgroup: Any
    rows: Any
    columns: Any

    @staticmethod
    def of(team: int) -> "_Program":
        i, head, batch = (lax.axis_index(name) for name in ("slice", "head", "batch"))
        warpgroup = lax.axis_index("warpgroup") if team > 1 else 0
        rows, columns = (pl.ds(n * SLICE, SLICE) for n in (i, warpgroup))
        return _Program(batch, head, warpgroup, rows, columns)

    def slot(self, step: Any) -> Any:
        """Where in shared memory this warpgroup keeps what it needs in a step."""
        return self.warpgroup * _STAGES + lax.rem(step, _STAGES)


class _Scratch(NamedTuple):
    """Shared memory of all warpgroups."""

    m: Any  # [team * _STAGES, ...]: columns of M, or rows
    sizes: Any  # [team * _STAGES, SLICE]
    full: Any
    operand: Any  # [team, SLICE, SLICE]: X, its rows divided by
    operand_sizes: Any  # [team, SLICE]
    met: Any

    @staticmethod
    def types(key_dim: int, m: tuple[int, int]) -> "_Scratch":
        team = key_dim // SLICE
        slots = team * _STAGES
        return _Scratch(
            plgpu.SMEM((slots, *m), f16, transforms=tiles()),
            plgpu.SMEM((slots, SLICE), f32),
            plgpu.Barrier(num_barriers=slots, num_arrivals=2),
            plgpu.SMEM((team, SLICE, SLICE), f16, transforms=tiles()),
            plgpu.SMEM((team, SLICE), f32),
            plgpu.Barrier(num_barriers=2, num_arrivals=team),
        )


class _Maps(NamedTuple):
    """Maps as a stream: the columns of M that a warpgroup needs, or in reverse the rows."""

    program: _Program
    m_ref: Any
    sizes_ref: Any
    scratch: _Scratch
    reverse: bool
    interpret: Any

    def fetch(self, i: Any, slot: Any) -> None:
        """Starts the copies of map i."""
        program, full = self.program, self.scratch.full.at[slot]
        m = self.m_ref.at[program.batch, i, program.head]
        m = m.at[program.columns] if self.reverse else m.at[:, program.columns]
        sizes = self.sizes_ref.at[program.batch, i, program.head, program.columns]
        plgpu.copy_gmem_to_smem(m, self.scratch.m.at[slot], full)
        plgpu.copy_gmem_to_smem(sizes, self.scratch.sizes.at[slot], full)

    def apply(
        self,
        slot: Any,
        operand: Callable[[Array], Array],
        meanwhile: Callable[[], Array] | None = None,
    ) -> tuple[Array, ...]:
        """The product with the map in a slot, its sizes and what `meanwhile` computes beside it.

        `operand` makes this warpgroup's part of the left matrix from the sizes.
        """
        scratch, warpgroup = self.scratch, self.program.warpgroup
        plgpu.barrier_wait(scratch.full.at[slot])
        size = by_column(load(scratch.sizes.at[slot], COLUMNS), SLICE)
        scratch.operand[warpgroup], operand_size = scaled(operand(size))
        store(scratch.operand_sizes.at[warpgroup], operand_size)
        plgpu.commit_smem()
        self._meet(0)
        m, team = scratch.m.at[slot], scratch.operand.shape[0]
        parts = [pl.ds(i * SLICE, SLICE) for i in range(team)]
        factors = [m.at[:, part].T if self.reverse else m.at[part] for part in parts]
        products = [(scratch.operand.at[i], factor) for i, factor in enumerate(factors)]
        products, others = _separately(products, meanwhile or (lambda: None), self.interpret)
        row_size = lambda i: load(scratch.operand_sizes.at[i], ROWS, optimized=False)
        products = [y * by_row(row_size(i), SLICE) for i, y in enumerate(products)]
        self._meet(1)  # the operand is free
        result = functools.reduce(jnp.add, products)
        return (result, size) if meanwhile is None else (result, size, others)

    def _meet(self, i: int) -> None:
        """Waits for the other warpgroups."""
        if self.scratch.operand.shape[0] > 1:
            plgpu.barrier_arrive(self.scratch.met.at[i])
            plgpu.barrier_wait(self.scratch.met.at[i])
        else:
            join_warps(self.interpret)


def _separately(
    pairs: list[tuple[Any, Any]], meanwhile: Callable[[], Any], interpret: Any
) -> tuple[list[Array], Any]:
    """The products of pairs, all at once, and what `meanwhile` computes beside them."""
    if not pairs:
        return [], meanwhile()
    others = lambda: _separately(pairs[1:], meanwhile, interpret)
    first, (rest, other) = product(pairs[0], meanwhile=others, interpret=interpret)
    return [first, *rest], other
