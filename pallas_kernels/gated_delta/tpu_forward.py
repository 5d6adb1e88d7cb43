"""The forward TPU kernel: the state carried in VMEM over the chunks of all blocks."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_delta.plan import Plan
from pallas_kernels.gated_delta.tpu_chunk import (
    Numerics,
    Tiling,
    inverses,
    pieces,
    product,
    read_chunk,
    triangle,
    varying,
)


def block_ends(plan, k, v, g, beta, initial_state, *, chunk_starts=False):
    """States after each block [B, blocks, H, K, V]; with chunk_starts, before each chunk."""
    tiling, numerics = Tiling.of(plan, k, v), Numerics.of(plan, k)
    size, group, dims = tiling.chunk, tiling.group, (tiling.key_dim, tiling.value_dim)

    def tokens(dim):
        return pl.BlockSpec((None, None, size, group * dim), lambda b, h, n, c: (b, n, c, h))

    gates = pl.BlockSpec((None, None, None, size, group), lambda b, h, n, c: (b, h, n, c, 0))
    state = pl.BlockSpec((None, group, *dims), lambda b, h, n, c: (b, h, 0, 0))
    out = pl.BlockSpec((None, None, group, *dims), lambda b, h, n, c: (b, n, h, 0, 0))
    shape = (tiling.batch, tiling.blocks, tiling.heads, *dims)
    if chunk_starts:
        out = pl.BlockSpec(
            (None, None, None, group, *dims), lambda b, h, n, c: (b, n, c, h, 0, 0)
        )
        shape = (tiling.batch, tiling.blocks, tiling.chunks, tiling.heads, *dims)
    return pl.pallas_call(
        partial(_kernel, tiling, numerics, chunk_starts),
        out_shape=varying(shape, jnp.float32, k),
        grid=tiling.grid,
        in_specs=[tokens(dims[0]), tokens(dims[1]), gates, gates, state],
        out_specs=out,
        scratch_shapes=[pltpu.VMEM((group, *dims), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=48 * 2**20,
        ),
        interpret=plan.interpret,
        name="gated_delta_forward",
    )(
        tiling.fold_features(k), tiling.fold_features(v),
        tiling.fold_heads(g), tiling.fold_heads(beta), initial_state,
    )  # fmt: skip


def _kernel(tiling, numerics, chunk_starts, k, v, g, beta, initial, out, state):
    block, chunk = pl.program_id(2), pl.program_id(3)

    @pl.when((block == 0) & (chunk == 0))
    def _():
        state[...] = initial[...]

    if chunk_starts:
        out[...] = state[...]

    x = read_chunk(tiling, chunk, k, v, g, beta)
    heads = range(tiling.group)
    narrow = partial(pieces, count=numerics.operand)
    lower = triangle(tiling.chunk, below=True)

    # Every line does one thing for all heads, which do not wait for each other.
    kts = [k.T for k in x.k]
    grams = [product((x.k[h],), (kts[h],)) for h in heads]
    ts = inverses(numerics, [jnp.where(lower, x.beta[h] * grams[h], 0.0) for h in heads])
    yts = [product((kts[h],), pieces(ts[h], numerics.inverse)) for h in heads]
    reads = [product(narrow(x.k[h]), narrow(state[h])) for h in heads]
    writes = [
        x.beta[h] * (x.r[h] * x.v[h].astype(jnp.float32) - x.gamma[h] * reads[h]) for h in heads
    ]
    for h in heads:
        state[h] = x.gamma[h] * state[h] + product(narrow(yts[h]), narrow(writes[h]))

    if not chunk_starts:
        @pl.when(chunk == tiling.chunks - 1)
        def _():
            out[...] = state[...]
