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
    tiling, numerics, k, v, g, beta, start, end, dk, dv, dg, dbeta, dinitial, dstate
):
    block, chunk = pl.program_id(2), pl.program_id(3)

    @pl.when((block == 0) & (chunk == 0))
    def _():
        dstate[...] = jnp.zeros_like(dstate)

    @pl.when(chunk == 0)
    def _():
        dstate[...] += end[...]

    x = read_chunk(tiling, tiling.chunks - 1 - chunk, k, v, g, beta)
    heads = range(tiling.group)
    lower = triangle(tiling.chunk, below=True)

    def narrow(x):
        return pieces(x, numerics.operand)

    def column(x, h):
        return x[:, h : h + 1]

    kt = [k.T for k in x.k]
    grams = [product((x.k[h],), (kt[h],)) for h in heads]
    ts = inverses(numerics, [column(x.beta, h) * grams[h] for h in heads])
    head = lax.broadcasted_iota(jnp.int32, x.beta.shape, 1)
    written = jnp.zeros_like(x.beta)  # <v_i, dv_i>
    dbetas = jnp.zeros_like(x.beta)
    kept = jnp.zeros_like(x.gamma)  # <dS, S>
    for h in heads:
        k, v = (x.k[h],), x.v[h].astype(jnp.float32)
        beta, r, gamma = column(x.beta, h), column(x.r, h), column(x.gamma, h)
        s, d = start[h], dstate[h]
        y = product(pieces(ts[h].T, numerics.inverse), k)
        residual = r * v - gamma * product(narrow(x.k[h]), narrow(s))
        dresidual = beta * product(narrow(y), narrow(d))
        dx = product(narrow(residual), narrow(d), (1, 1))
        z = product(narrow(ts[h]), narrow(beta * dx))
        p = jnp.where(lower, -product(narrow(y), narrow(z), (1, 1)), 0.0)
        q = beta * p
        dv_h = r * dresidual
        dk_h = z - gamma * product(narrow(dresidual), narrow(s), (1, 1))
        dk_h += product(narrow(q + q.T), k)
        ds = gamma * (d - product((kt[h],), narrow(dresidual)))
        dstate[h] = ds
        dk[:, h * tiling.key_dim : (h + 1) * tiling.key_dim] = dk_h.astype(dk.dtype)
        dv[:, h * tiling.value_dim : (h + 1) * tiling.value_dim] = dv_h.astype(dv.dtype)
        dbeta_h = jnp.sum(dx * y, 1, keepdims=True) + jnp.sum(p * grams[h], 1, keepdims=True)
        dbetas = jnp.where(head == h, dbeta_h, dbetas)
        written = jnp.where(head == h, jnp.sum(v * dv_h, 1, keepdims=True), written)
        kept = jnp.where(head[:1] == h, jnp.sum(ds * s, keepdims=True), kept)
    dbeta[...] = dbetas
    dg[...] = kept + product((lower.astype(jnp.float32),), (written,))

    @pl.when((block == tiling.blocks - 1) & (chunk == tiling.chunks - 1))
    def _():
        dinitial[...] = dstate[...]
