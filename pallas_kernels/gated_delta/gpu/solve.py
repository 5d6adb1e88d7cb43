"""Y = (I + L)^-T K of every chunk: all that is not sequential in the forward pass."""

from typing import Any

import jax
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gated_delta.gpu import inverse
from pallas_kernels.gated_delta.gpu.tiles import (
    CHUNK,
    COLUMNS,
    bf16,
    by_column,
    kernel,
    load,
    product,
    split,
    tiles,
)


def solve(k: Array, gates: Array, *, interpret: Any) -> Array:
    """Y = U K with U = (I + upper(K K^T diag(beta)))^-1, chunk by chunk.

    Args:
        k: Keys [N, block, H, K] bfloat16, N all blocks; block a multiple of 8.
        gates: [N, H, chunks, 3, 64] float32 as in `gates.py`.
        interpret: As in Plan.

    Returns:
        Y, shape and dtype of k.
    """
    blocks, _, heads, key_dim = k.shape

    def body(k_ref: Any, gates_ref: Any, y_ref: Any, tile: Any, beta: Any, scratch: Any, full: Any):
        n, head, chunk = (lax.axis_index(name) for name in ("block", "head", "chunk"))
        place = (n, pl.ds(chunk * CHUNK, CHUNK), head)
        plgpu.copy_gmem_to_smem(k_ref.at[place], tile, full)
        plgpu.copy_gmem_to_smem(gates_ref.at[n, head, chunk], beta, full)
        plgpu.barrier_wait(full)
        scale = by_column(load(beta.at[1], COLUMNS), CHUNK)
        gram, _ = product((tile, tile.T), interpret=interpret)
        left, right = inverse.unit_inverse(gram * scale, scratch, upper=True, interpret=interpret)
        top, bottom = (tile.at[pl.ds(start, inverse.HALF)] for start in (0, inverse.HALF))
        (l_high, l_low), (r_high, r_low) = split(left), split(right)
        pairs = ((l_low, top), (r_low, bottom), (l_high, top), (r_high, bottom))
        y, _ = product(*pairs, interpret=interpret)
        plgpu.commit_smem()  # all warps have read the keys
        tile[...] = y.astype(bf16)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, y_ref.at[place])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return kernel(
        "solve",
        body,
        grid={"chunk": gates.shape[2], "head": heads, "block": blocks},
        scratch=[
            plgpu.SMEM((CHUNK, key_dim), bf16, transforms=tiles(inverse.HALF)),
            plgpu.SMEM(gates.shape[3:], gates.dtype),
            inverse.scratch(),
            plgpu.Barrier(num_arrivals=2),
        ],
        out_type=jax.ShapeDtypeStruct(k.shape, bf16),
        interpret=interpret,
    )(k, gates)
