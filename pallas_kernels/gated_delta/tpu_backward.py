"""The backward TPU kernel: chunks from the last to the first, the state's cotangent in VMEM.

With D the cotangent of a chunk's end state, and names as in `xla.py`:

    R  = diag(r) V - gamma K S      dR = X D      dX = R D^T      Z = T diag(beta) dX
    P  = -lower(Y Z^T)              Q = diag(beta) P
    dV = diag(r) dR                 dK = Z - gamma dR S^T + (Q + Q^T) K
    dbeta = rowsum(dX * Y + P * K K^T)
    dS = gamma (D - K^T dR)         dg_t = <dS, S> + sum_{i<t} <v_i, dv_i>
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta.plan import Plan
from pallas_kernels.gated_delta.tpu_chunk import (
    Chunk,
    Numerics,
    pieces,
    product,
    read_chunk,
    strictly_lower,
)
from pallas_kernels.gated_delta.tpu_layout import Layout


def gradients(
    plan: Plan, k: Array, v: Array, g: Array, beta: Array, matrices: Sequence[Array], dstates: Array
) -> tuple[Array, ...]:
    """Return gradients of k, v, g, beta and the initial state.

    `matrices`: start state and T of every chunk; `dstates` [B, blocks + 1, H, K, V].
    """
    layout = Layout.of(plan, k, v, reverse=True)
    tokens, square = layout.fold(k, v, g, beta), (layout.chunk, layout.chunk)
    specs = layout.tokens()
    of_matrices = [layout.chunk_matrix(*layout.state), layout.chunk_matrix(*square)]
    initial = (layout.batch, layout.heads, *layout.state)
    *dtokens, dinitial = layout.call(
        partial(_kernel, Numerics.of(plan, k)),
        "gated_delta_backward",
        plan,
        [*tokens, *matrices, dstates],
        [*specs, *of_matrices, layout.block_state(ahead=1)],
        [
            *((x.shape, x.dtype, spec) for x, spec in zip(tokens, specs, strict=True)),
            (initial, jnp.float32, layout.carried_state()),
        ],
    )
    return (*layout.unfold(*dtokens), dinitial + dstates[:, 0])


def _kernel(numerics: Numerics, layout: Layout, *refs: Any) -> None:
    k, v, g, beta, start, inverse, dend, dk, dv, dg, dbeta, dinitial, dstate = refs
    block, chunk = layout.position()

    @pl.when(layout.first())
    def _():
        dstate[...] = jnp.zeros_like(dstate)

    @pl.when(chunk == layout.chunks - 1)
    def _():
        dstate[...] += dend[...]

    x = read_chunk(layout, k, v, g, beta)
    _step(numerics, layout, x, start, inverse, dk, dv, dg, dbeta, dstate)

    @pl.when((block == 0) & (chunk == 0))
    def _():
        dinitial[...] = dstate[...]


def _step(
    numerics: Numerics, layout: Layout, x: Chunk, start: Any, inverse: Any,
    dk: Any, dv: Any, dg: Any, dbeta: Any, dstate: Any,
) -> None:  # fmt: skip
    """Move `dstate` back by one chunk and write the gradients of its tokens."""
    heads, lower = range(layout.group), strictly_lower(layout.chunk)
    narrow = partial(pieces, count=numerics.narrow)
    wide = partial(pieces, count=numerics.wide)
    beta, r, gamma = x.beta, x.r, x.gamma
    values = [v.astype(jnp.float32) for v in x.v]

    # Each line works on all heads, which do not depend on each other.
    kts = [k.T for k in x.k]
    grams = [product((x.k[h],), (kts[h],)) for h in heads]
    ys = [product(wide(inverse[h].T), (x.k[h],)) for h in heads]
    reads = [product(narrow(x.k[h]), narrow(start[h])) for h in heads]
    residuals = [r[h] * values[h] - gamma[h] * reads[h] for h in heads]
    dresiduals = [beta[h] * product(wide(ys[h]), wide(dstate[h])) for h in heads]
    dxs = [product(wide(residuals[h]), wide(dstate[h]), 1) for h in heads]
    zs = [product(wide(inverse[h]), wide(beta[h] * dxs[h])) for h in heads]
    ps = [jnp.where(lower, -product(narrow(ys[h]), narrow(zs[h]), 1), 0.0) for h in heads]
    qs = [beta[h] * ps[h] for h in heads]
    dvs = [r[h] * dresiduals[h] for h in heads]
    dks = [product(narrow(dresiduals[h]), narrow(start[h]), 1) for h in heads]
    dks = [zs[h] - gamma[h] * dks[h] for h in heads]
    dks = [dks[h] + product(narrow(qs[h] + qs[h].T), (x.k[h],)) for h in heads]
    dstates = [dstate[h] - product((kts[h],), wide(dresiduals[h])) for h in heads]
    dstates = [gamma[h] * dstates[h] for h in heads]

    kept = [jnp.sum(dstates[h] * start[h], keepdims=True) for h in heads]
    written = [_rowsum(values[h] * dvs[h]) for h in heads]
    dbetas = [_rowsum(dxs[h] * ys[h]) + _rowsum(ps[h] * grams[h]) for h in heads]
    for h in heads:
        dstate[h] = dstates[h]
        dk[:, h * layout.key_dim : (h + 1) * layout.key_dim] = dks[h].astype(dk.dtype)
        dv[:, h * layout.value_dim : (h + 1) * layout.value_dim] = dvs[h].astype(dv.dtype)
    dbeta[...] = _columns(dbetas)
    dg[...] = _columns(kept) + product((lower.astype(jnp.float32),), (_columns(written),))


def _rowsum(x: Array) -> Array:
    return jnp.sum(x, 1, keepdims=True)


def _columns(xs: Sequence[Array]) -> Array:
    """Join one [C, 1] per head into [C, heads]."""
    shape = (xs[0].shape[0], len(xs))
    head = lax.broadcasted_iota(jnp.int32, shape, 1)
    out = jnp.zeros(shape, jnp.float32)
    for h, x in enumerate(xs):
        out = jnp.where(head == h, x, out)
    return out
