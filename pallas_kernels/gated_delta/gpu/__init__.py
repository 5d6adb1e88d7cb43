"""The gated delta rule on NVIDIA Hopper GPUs, in Pallas (Mosaic GPU).

Forward: Y of all chunks at once (`solve`), the affine maps of segments of chunks (`scan`), and
these folded in order (`fold`). Backward: cotangents folded through the same maps, the states and
cotangents of all chunks (`scan`), and the gradients of all chunks at once (`gradients`). Letters
are those of `xla.py`; arrays are [N, block, H, feature] with N all blocks of the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.devices import split_by_xla
from pallas_kernels.gated_delta.gpu import gates as gate
from pallas_kernels.gated_delta.gpu.fold import fold
from pallas_kernels.gated_delta.gpu.gradients import gradients
from pallas_kernels.gated_delta.gpu.scan import chunk_cotangents, chunk_states, maps
from pallas_kernels.gated_delta.gpu.solve import solve
from pallas_kernels.gated_delta.gpu.tiles import CHUNK, SLICE
from pallas_kernels.gated_delta.plan import Plan

_PROGRAMS = 264  # two for each multiprocessor of an H100 or H200


class Residuals(NamedTuple):
    """Kept for the backward pass: inputs, Y, parts of A^T and the states S^T of all segments."""

    k: Array
    v: Array
    g: Array
    beta: Array
    y: Array
    high: Array
    low: Array
    states: Array


def obstacle(plan: Plan, k: Array, v: Array) -> str | None:
    """Why these kernels cannot take a call, or None."""
    device = jax.devices()[0]
    if not plan.interpret and getattr(device, "compute_capability", None) != "9.0":
        return f"needs an NVIDIA Hopper GPU; the device is {device.device_kind}"
    if k.dtype != jnp.bfloat16:
        return f"needs bfloat16 keys; k has {k.dtype}"
    if plan.operand != jnp.bfloat16:
        return "has no precision 'high'"
    if plan.chunk_size not in (None, CHUNK):
        return f"needs chunk_size {CHUNK}; got {plan.chunk_size}"
    if k.shape[3] not in (64, 128):
        return f"needs 64 or 128 features a key; k has {k.shape[3]}"
    if v.shape[3] % SLICE or not v.shape[3]:
        return f"needs a multiple of {SLICE} features a value; v has {v.shape[3]}"
    return None if plan.interpret else split_by_xla()


def forward(
    plan: Plan, k: Array, v: Array, g: Array, beta: Array, initial_state: Array
) -> tuple[Array, Residuals]:
    """States at the boundaries of blocks, and what the backward pass needs."""
    batch = len(k)
    kb, vb, gates = _inputs(plan, k, v, g, beta)
    segments = _segments(kb, vb, gates)
    y = solve(kb, gates, interpret=plan.interpret)
    parts = maps(kb, y, vb, gates, segments=segments, interpret=plan.interpret)
    high, low, added = (x.reshape(batch, -1, *x.shape[1:]) for x in parts)
    states = fold(high, low, added, initial_state.mT, reverse=False, interpret=plan.interpret)
    return states[:, ::segments].mT, Residuals(k, v, g, beta, y, high, low, states[:, :-1])


def backward(plan: Plan, res: Residuals, dstates: Array) -> tuple[Array, ...]:
    """Gradients of k, v, g, beta and initial_state."""
    k, v, gates = _inputs(plan, res.k, res.v, res.g, res.beta)
    segments = _segments(k, v, gates)
    static = {"segments": segments, "interpret": plan.interpret}
    # Between the boundaries of blocks no cotangent comes in.
    added = jnp.zeros_like(res.states).at[:, ::segments].set(dstates[:, :-1].mT)
    ends = fold(res.high, res.low, added, dstates[:, -1].mT, reverse=True, interpret=plan.interpret)
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    states = chunk_states(k, res.y, v, gates, flat(res.states), **static)
    cotangents = chunk_cotangents(k, res.y, gates, flat(ends[:, 1:]), **static)
    dk, dv, rows = gradients(k, res.y, v, gates, states, cotangents, interpret=plan.interpret)
    dbeta, dg = (gate.tokens(rows[..., i, :], k.shape[1]) for i in (0, 1))
    dtokens = (dk, dv, dg, dbeta)
    joined = (_join(plan, d, x) for d, x in zip(dtokens, res[:4], strict=True))
    return (*joined, ends[:, 0].mT)


def _inputs(plan: Plan, k: Array, v: Array, g: Array, beta: Array) -> tuple[Array, Array, Array]:
    k, v, g, beta = (_split(plan, x) for x in (k, v, g, beta))
    return k, v, gate.chunk_gates(g, beta)


def _split(plan: Plan, x: Array) -> Array:
    """[B, T, H, ...] -> [N, block, H, ...]; tokens to a multiple of 8 are zeros: the identity."""
    x = x.reshape(-1, plan.block_size, *x.shape[2:])
    return jnp.pad(x, ((0, 0), (0, -plan.block_size % 8), *((0, 0),) * (x.ndim - 2)))


def _join(plan: Plan, x: Array, like: Array) -> Array:
    return x[:, : plan.block_size].reshape(like.shape).astype(like.dtype)


def _segments(k: Array, v: Array, gates: Array) -> int:
    """Segments of a block: enough programs to fill the device, and none without a chunk."""
    blocks, heads, chunks = gates.shape[:3]
    programs = blocks * heads * (v.shape[3] + k.shape[3]) // SLICE
    wanted = max(1, min(_PROGRAMS // programs, chunks))
    each = -(-chunks // wanted)
    return -(-chunks // each)
