"""The forward TPU kernel: one chunk per grid step, the state carried in VMEM."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.gated_delta.plan import Plan
from pallas_kernels.gated_delta.tpu_chunk import Numerics, inverses, pieces, product, read_chunk
from pallas_kernels.gated_delta.tpu_layout import Layout


def block_ends(plan: Plan, *inputs: Array) -> Array:
    """Return the state after each block, [B, blocks, H, K, V]."""
    layout = Layout.of(plan, *inputs[:2])
    shape = (layout.batch, layout.blocks, layout.heads, *layout.state)
    outputs = [(shape, jnp.float32, layout.block_state())]
    return _call(plan, layout, _ends_kernel, inputs, outputs)[0]


def chunk_matrices(plan: Plan, *inputs: Array) -> Sequence[Array]:
    """Return start state and T = (I + L)^-1 of every chunk, [B, blocks, chunks, H, ., .]."""
    layout = Layout.of(plan, *inputs[:2])
    lead = (layout.batch, layout.blocks, layout.chunks, layout.heads)
    shapes = (layout.state, (layout.chunk, layout.chunk))
    outputs = [((*lead, *shape), jnp.float32, layout.chunk_matrix(*shape)) for shape in shapes]
    return _call(plan, layout, _chunks_kernel, inputs, outputs)


def _call(plan: Plan, layout: Layout, kernel: Any, inputs: Any, outputs: Any) -> Sequence[Array]:
    *tokens, initial_state = inputs
    kernel = partial(kernel, Numerics.of(plan, tokens[0]))
    in_specs = [*layout.tokens(), layout.carried_state()]
    inputs = [*layout.fold(*tokens), initial_state]
    return layout.call(kernel, "gated_delta_forward", plan, inputs, in_specs, outputs)


def _ends_kernel(numerics: Numerics, layout: Layout, *refs: Any) -> None:
    *inputs, end, state = refs
    _step(numerics, layout, *inputs, state)

    @pl.when(layout.position()[1] == layout.chunks - 1)
    def _():
        end[...] = state[...]


def _chunks_kernel(numerics: Numerics, layout: Layout, *refs: Any) -> None:
    *inputs, start, inverse, state = refs
    starts, ts = _step(numerics, layout, *inputs, state)
    for h in range(layout.group):
        start[h], inverse[h] = starts[h], ts[h]


def _step(numerics: Numerics, layout: Layout, *refs: Any) -> tuple[list[Array], list[Array]]:
    """Advance `state` by one chunk; return its start state and T for each head."""
    k, v, g, beta, initial, state = refs

    @pl.when(layout.first())
    def _():
        state[...] = initial[...]

    x = read_chunk(layout, k, v, g, beta)
    heads = range(layout.group)
    narrow = partial(pieces, count=numerics.narrow)
    wide = partial(pieces, count=numerics.wide)

    # Each line works on all heads, which do not depend on each other.
    kts = [k.T for k in x.k]
    grams = [product((x.k[h],), (kts[h],)) for h in heads]
    ts = inverses(numerics, [x.beta[h] * grams[h] for h in heads])
    yts = [product((kts[h],), wide(ts[h])) for h in heads]
    starts = [state[h] for h in heads]
    reads = [product(narrow(x.k[h]), narrow(starts[h])) for h in heads]
    residuals = [x.r[h] * x.v[h].astype(jnp.float32) - x.gamma[h] * reads[h] for h in heads]
    writes = [product(wide(yts[h]), wide(x.beta[h] * residuals[h])) for h in heads]
    for h in heads:
        state[h] = x.gamma[h] * starts[h] + writes[h]
    return starts, ts
