"""Y = (I + L)^-T K of every chunk, and its gates: the parallel part of the forward pass."""

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
    ROWS,
    TINY,
    WGMMA,
    bf16,
    by_column,
    by_row,
    f16,
    f32,
    iota,
    kernel,
    load,
    product,
    split_f16,
    store,
    tiles,
    warpgroup_barrier,
)

_COLUMNS = 64  # of Y at a time


def solve(k: Array, rows: Array, *, backward: bool, interpret: Any) -> tuple[Array, ...]:
    """Compute Y = U K with U = (I + upper(K K^T diag(beta)))^-1, for every chunk.

    Without a backward pass, which needs Y itself, compute diag(beta / largest beta) Y, so that
    `maps` has less to do at every step.

    Gates of a chunk are r_i = exp(sum_{j>i} g_j), beta, and, repeated, gamma = exp(sum_j g_j) and
    the largest beta. Sums are never differences of sums, in which a reset of -1e4 would absorb the
    rest.

    Args:
        k: Keys [N, block, H, K] bfloat16, for N blocks; block is a multiple of 8.
        rows: g and beta, [N, 2, H, chunks, 64] float32; zeros in the padding of the last chunk.
        backward: Whether there will be a backward pass.
        interpret: As in Plan.

    Returns:
        Y in the shape of k, float16; gates [N, H, chunks, 4, 64] float32; and U
        [N, H, chunks, 64, 64] float16, if there will be a backward pass.
    """
    blocks, _, heads, key_dim = k.shape
    entries = blocks, heads, rows.shape[3]

    def body(k_ref, rows_ref, y_ref, gates_ref, *rest):
        *u_refs, tile_rows, full = rest
        n, head, chunk = (lax.axis_index(name) for name in ("block", "head", "chunk"))
        place, entry = (n, pl.ds(chunk * CHUNK, CHUNK), head), (n, head, chunk)

        def invert(tile: Any, keys: Any) -> tuple[list[Array], tuple[Array, Array]]:
            plgpu.copy_gmem_to_smem(k_ref.at[place], tile, full)
            for i in (0, 1):
                plgpu.copy_gmem_to_smem(rows_ref.at[n, i, head, chunk], tile_rows.at[i], full)
            plgpu.barrier_wait(full)
            strength = by_column(load(tile_rows.at[1], COLUMNS), CHUNK)
            strongest = jnp.maximum(strength.max(1), TINY)

            def convert() -> None:
                # float16, so that two parts of U hold 22 bits, see `inverse`.
                for start in range(0, key_dim, _COLUMNS):
                    columns = pl.ds(start, _COLUMNS)
                    x = load(tile.at[:, columns], WGMMA)
                    keys[:, start : start + _COLUMNS] = x.astype(f32).astype(f16)

            gram, _ = product((tile, tile.T), overlap_with=convert, interpret=interpret)
            u = inverse.unit_inverse(gram * strength, interpret=interpret)
            weights = None
            if not backward:
                beta = load(tile_rows.at[1], ROWS, optimized=False)
                weights = beta / strongest
            y = _times_keys(u, keys, weights, interpret)
            warpgroup_barrier(interpret)  # the key buffer is reused
            return y, u

        def emit(y_tile: Any, *u_tiles: Any) -> None:
            for start, part in zip(range(0, key_dim, _COLUMNS), y, strict=True):
                y_tile[:, start : start + _COLUMNS] = part
            for ref, part in zip(u_tiles, u, strict=False):
                ref[...] = part.astype(f16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(y_tile, y_ref.at[place])
            for i, ref in enumerate(u_tiles):
                columns = pl.ds(i * inverse.HALF, inverse.HALF)
                plgpu.copy_smem_to_gmem(ref, u_refs[0].at[(*entry, slice(None), columns)])
            _write_gates(gates_ref.at[entry], tile_rows)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        keys = lambda dtype: plgpu.SMEM((CHUNK, key_dim), dtype, transforms=tiles(inverse.HALF))
        out = plgpu.SMEM((CHUNK, key_dim), f16, transforms=tiles())
        half = plgpu.SMEM((CHUNK, inverse.HALF), f16, transforms=tiles(inverse.HALF))
        y, u = pl.run_scoped(invert, keys(bf16), keys(f16))
        pl.run_scoped(emit, out, *([half, half] if backward else []))

    return kernel(
        "solve",
        body,
        grid={"block": blocks, "chunk": entries[2], "head": heads},
        scratch=[plgpu.SMEM((2, CHUNK), f32), plgpu.Barrier(num_arrivals=3)],
        out_type=[
            jax.ShapeDtypeStruct(k.shape, f16),
            jax.ShapeDtypeStruct((*entries, 4, CHUNK), f32),
            *([jax.ShapeDtypeStruct((*entries, CHUNK, CHUNK), f16)] if backward else []),
        ],
        interpret=interpret,
    )(k, rows)


def _times_keys(
    u: tuple[Array, Array], tile: Any, weights: Array | None, interpret: Any
) -> list[Array]:
    """Return diag(weights) U K in float16, 64 columns at a time to save registers."""
    (l_high, l_low), (r_high, r_low) = map(split_f16, u)
    parts = []
    for start in range(0, tile.shape[1], _COLUMNS):
        rows = (tile.at[pl.ds(first, inverse.HALF)] for first in (0, inverse.HALF))
        top, bottom = (ref.at[:, pl.ds(start, _COLUMNS)] for ref in rows)
        pairs = ((l_low, top), (r_low, bottom), (l_high, top), (r_high, bottom))
        part, _ = product(*pairs, interpret=interpret)
        if weights is not None:
            part *= by_row(weights, _COLUMNS)
        parts.append(part.astype(f16))
    return parts


def _write_gates(ref: Any, rows: Any) -> None:
    """Write r, beta, gamma and the largest beta, computed from g and beta."""
    g, beta = (by_column(load(rows.at[i], COLUMNS), CHUNK) for i in (0, 1))
    row, column = (iota(CHUNK, CHUNK, dimension) for dimension in (0, 1))
    masked = lambda mask, x: jnp.where(mask, x, 0.0).sum(1)
    store(ref.at[0], jnp.exp(masked(column > row, g)))
    store(ref.at[1], masked(column == row, beta))
    store(ref.at[2], jnp.exp(g.sum(1)))
    store(ref.at[3], beta.max(1))
