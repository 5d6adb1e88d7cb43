"""Y = (I + L)^-T K of every chunk, and its gates: all that is not sequential in the forward pass."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.gpu import inverse
from pallas_kernels.gated_delta.gpu.tiles import (
    CHUNK,
    COLUMNS,
    bf16,
    by_column,
    f16,
    f32,
    iota,
    kernel,
    load,
    product,
    split,
    store,
    tiles,
)

_PROGRAMS = 396  # three for each multiprocessor of an H100 or H200; each takes chunks in turn
_STAGES = 2
_COLUMNS = 64  # of Y at a time


def solve(k: Array, rows: Array, *, keep_inverse: bool, interpret: Any) -> tuple[Array, ...]:
    """Y = U K with U = (I + upper(K K^T diag(beta)))^-1, chunk by chunk.

    Gates of a chunk are r_i = exp(sum_{j>i} g_j), beta, and gamma = exp(sum_j g_j), repeated. Sums
    are never differences of sums, which a reset of -1e4 would swallow.

    Args:
        k: Keys [N, block, H, K] bfloat16, N all blocks; block a multiple of 8.
        rows: g and beta, [N, H, chunks, 2, 64] float32, zeros where tokens fill up the last chunk.
        keep_inverse: Whether to return U.
        interpret: As in Plan.

    Returns:
        Y in the shape of k, float16; gates [N, H, chunks, 3, 64] float32; and U
        [N, H, chunks, 64, 64] float16.
    """
    _, _, heads, key_dim = k.shape
    blocks, _, chunks = rows.shape[:3]
    units = blocks * chunks * heads
    programs = min(units, _PROGRAMS)
    inverse_type = jax.ShapeDtypeStruct((*rows.shape[:3], CHUNK, CHUNK), f16)

    def body(k_ref, rows_ref, y_ref, gates_ref, *rest):
        *u_refs, k_tiles, row_tiles, y_tile, u_tiles, full = rest
        program = lax.axis_index("program")
        count = lax.div(units - 1 - program, programs) + 1

        def places(step: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            """Where a step's chunk lies in arrays of tokens and in arrays of chunks."""
            unit = program + step * programs
            head, unit = lax.rem(unit, heads), lax.div(unit, heads)
            chunk, block = lax.rem(unit, chunks), lax.div(unit, chunks)
            return (block, pl.ds(chunk * CHUNK, CHUNK), head), (block, head, chunk)

        def fetch(step: Any) -> None:
            slot, (tokens, entry) = lax.rem(step, _STAGES), places(step)
            plgpu.copy_gmem_to_smem(k_ref.at[tokens], k_tiles.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(rows_ref.at[entry], row_tiles.at[slot], full.at[slot])

        fetch(jnp.int32(0))

        @pl.loop(0, count)
        def _chunk(step):
            pl.when(step + 1 < count)(lambda: fetch(step + 1))
            slot, (tokens, entry) = lax.rem(step, _STAGES), places(step)
            keys = k_tiles.at[slot]
            plgpu.barrier_wait(full.at[slot])
            strength = by_column(load(row_tiles.at[slot, 1], COLUMNS), CHUNK)
            gram, _ = product((keys, keys.T), interpret=interpret)
            u = inverse.unit_inverse(gram * strength, interpret=interpret)
            y = _times_keys(u, keys, interpret)
            gates = _gates(row_tiles.at[slot])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the step before has left
            for start, part in zip(range(0, key_dim, _COLUMNS), y, strict=True):
                y_tile[:, start : start + _COLUMNS] = part
            for ref, part in zip(u_tiles, u, strict=False):
                ref[...] = part.astype(f16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_tile, y_ref.at[tokens])
            for i, ref in enumerate(u_tiles):
                columns = pl.ds(i * inverse.HALF, inverse.HALF)
                plgpu.copy_smem_to_gmem(ref, u_refs[0].at[(*entry, slice(None), columns)])
            for i, gate in enumerate(gates):
                store(gates_ref.at[(*entry, i)], gate)

        plgpu.wait_smem_to_gmem(0)

    half = plgpu.SMEM((CHUNK, inverse.HALF), f16, transforms=tiles(inverse.HALF))
    return kernel(
        "solve",
        body,
        grid={"program": programs},
        scratch=[
            plgpu.SMEM((_STAGES, CHUNK, key_dim), bf16, transforms=tiles(inverse.HALF)),
            plgpu.SMEM((_STAGES, 2, CHUNK), f32),
            plgpu.SMEM((CHUNK, key_dim), f16, transforms=tiles()),
            [half, half] if keep_inverse else [],
            plgpu.Barrier(num_barriers=_STAGES, num_arrivals=2),
        ],
        out_type=[
            jax.ShapeDtypeStruct(k.shape, f16),
            jax.ShapeDtypeStruct((*rows.shape[:3], 3, CHUNK), f32),
            *([inverse_type] if keep_inverse else []),
        ],
        interpret=interpret,
    )(k, rows)


def _times_keys(u: tuple[Array, Array], tile: Any, interpret: Any) -> list[Array]:
    """Columns of U K by twos of 64, float16: half the registers of all at once."""
    (l_high, l_low), (r_high, r_low) = map(split, u)
    parts = []
    for start in range(0, tile.shape[1], _COLUMNS):
        rows = (tile.at[pl.ds(first, inverse.HALF)] for first in (0, inverse.HALF))
        top, bottom = (ref.at[:, pl.ds(start, _COLUMNS)] for ref in rows)
        pairs = ((l_low, top), (r_low, bottom), (l_high, top), (r_high, bottom))
        parts.append(product(*pairs, interpret=interpret)[0].astype(f16))
    return parts


def _gates(rows: Any) -> tuple[Array, Array, Array]:
    """r, beta and gamma, from g and beta."""
    g, beta = (by_column(load(rows.at[i], COLUMNS), CHUNK) for i in (0, 1))
    row, column = (iota(CHUNK, CHUNK, dimension) for dimension in (0, 1))
    masked = lambda mask, x: jnp.where(mask, x, 0.0).sum(1)
    return jnp.exp(masked(column > row, g)), masked(column == row, beta), jnp.exp(g.sum(1))
