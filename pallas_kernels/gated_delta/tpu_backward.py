"""The backward TPU kernel: chunks in reverse, the cotangent of the state carried in VMEM."""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

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


def gradients(plan, k, v, g, beta, starts, dstates):
    """Gradients of k, v, g, beta and the initial state."""
    tiling, numerics = Tiling.of(plan, k, v), Numerics.of(plan, k)
    size, group, dims = tiling.chunk, tiling.group, (tiling.key_dim, tiling.value_dim)
    blocks, chunks = tiling.blocks - 1, tiling.chunks - 1

    def tokens(dim):
        return pl.BlockSpec(
            (None, None, size, group * dim), lambda b, h, n, c: (b, blocks - n, chunks - c, h)
        )

    gates = pl.BlockSpec(
        (None, None, None, size, group), lambda b, h, n, c: (b, h, blocks - n, chunks - c, 0)
    )
    start = pl.BlockSpec(
        (None, None, None, group, *dims), lambda b, h, n, c: (b, blocks - n, chunks - c, h, 0, 0)
    )
    end = pl.BlockSpec((None, None, group, *dims), lambda b, h, n, c: (b, blocks - n + 1, h, 0, 0))
    initial = pl.BlockSpec((None, group, *dims), lambda b, h, n, c: (b, h, 0, 0))
    folded = (
        tiling.fold_features(k), tiling.fold_features(v),
        tiling.fold_heads(g), tiling.fold_heads(beta),
    )  # fmt: skip
    like = [varying(x.shape, x.dtype, k) for x in folded]
    state = varying((tiling.batch, tiling.heads, *dims), jnp.float32, k)
    token_specs = [tokens(dims[0]), tokens(dims[1]), gates, gates]
    dk, dv, dg, dbeta, dinitial = pl.pallas_call(
        partial(_kernel, tiling, numerics),
        out_shape=(*like, state),
        grid=tiling.grid,
        in_specs=[*token_specs, start, end],
        out_specs=(*token_specs, initial),
        scratch_shapes=[pltpu.VMEM((group, *dims), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=64 * 2**20,
        ),
        interpret=plan.interpret,
        name="gated_delta_backward",
    )(*folded, starts, dstates)
    return (
        dk.reshape(k.shape), dv.reshape(v.shape),
        tiling.unfold_heads(dg), tiling.unfold_heads(dbeta), dinitial + dstates[:, 0],
    )  # fmt: skip


def _kernel(
    tiling, numerics, k, v, g, writing, start, end, dk, dv, dg, dbeta, dinitial, dstate
):
    block, chunk = pl.program_id(2), pl.program_id(3)

    @pl.when((block == 0) & (chunk == 0))
    def _():
        dstate[...] = jnp.zeros_like(dstate)

    @pl.when(chunk == 0)
    def _():
        dstate[...] += end[...]

    x = read_chunk(tiling, tiling.chunks - 1 - chunk, k, v, g, writing)
    heads = range(tiling.group)
    narrow = partial(pieces, count=numerics.operand)
    wide = partial(pieces, count=numerics.inverse)
    lower = triangle(tiling.chunk, below=True)
    beta, r, gamma = x.beta, x.r, x.gamma
    values = [v.astype(jnp.float32) for v in x.v]

    # Every line does one thing for all heads, which do not wait for each other.
    kts = [k.T for k in x.k]
    grams = [product((x.k[h],), (kts[h],)) for h in heads]
    ts = inverses(numerics, [jnp.where(lower, beta[h] * grams[h], 0.0) for h in heads])
    ys = [product(wide(ts[h].T), (x.k[h],)) for h in heads]
    reads = [product(narrow(x.k[h]), narrow(start[h])) for h in heads]
    residuals = [r[h] * values[h] - gamma[h] * reads[h] for h in heads]
    dresiduals = [beta[h] * product(narrow(ys[h]), narrow(dstate[h])) for h in heads]
    dxs = [product(narrow(residuals[h]), narrow(dstate[h]), 1) for h in heads]
    zs = [product(narrow(ts[h]), narrow(beta[h] * dxs[h])) for h in heads]
    ps = [jnp.where(lower, -product(narrow(ys[h]), narrow(zs[h]), 1), 0.0) for h in heads]
    qs = [beta[h] * ps[h] for h in heads]
    dvs = [r[h] * dresiduals[h] for h in heads]
    dks = [product(narrow(dresiduals[h]), narrow(start[h]), 1) for h in heads]
    dks = [zs[h] - gamma[h] * dks[h] for h in heads]
    dks = [dks[h] + product(narrow(qs[h] + qs[h].T), (x.k[h],)) for h in heads]
    dstates = [dstate[h] - product((kts[h],), narrow(dresiduals[h])) for h in heads]
    dstates = [gamma[h] * dstates[h] for h in heads]

    kept = [jnp.sum(dstates[h] * start[h], keepdims=True) for h in heads]
    written = [jnp.sum(values[h] * dvs[h], 1, keepdims=True) for h in heads]
    dbetas = [
        jnp.sum(dxs[h] * ys[h], 1, keepdims=True) + jnp.sum(ps[h] * grams[h], 1, keepdims=True)
        for h in heads
    ]
    for h in heads:
        dstate[h] = dstates[h]
        dk[:, h * tiling.key_dim : (h + 1) * tiling.key_dim] = dks[h].astype(dk.dtype)
        dv[:, h * tiling.value_dim : (h + 1) * tiling.value_dim] = dvs[h].astype(dv.dtype)
    dbeta[...] = _columns(dbetas)
    dg[...] = _columns(kept) + product((lower.astype(jnp.float32),), (_columns(written),))

    @pl.when((block == tiling.blocks - 1) & (chunk == tiling.chunks - 1))
    def _():
        dinitial[...] = dstate[...]


def _columns(xs):
    """[C, 1] of every head -> [C, heads]."""
    shape = (xs[0].shape[0], len(xs))
    head = lax.broadcasted_iota(jnp.int32, shape, 1)
    out = jnp.zeros(shape, jnp.float32)
    for h, x in enumerate(xs):
        out = jnp.where(head == h, x, out)
    return out
