"""The gated delta rule on NVIDIA Hopper GPUs, in Pallas (Mosaic GPU).

Forward: Y of all chunks at once (`solve`), the affine maps of segments of chunks (`scan`), and
these folded in order (`fold`). Backward: cotangents folded through the same maps, the states before
all chunks (`scan`), and the gradients, segment by segment backwards (`gradients`). `segments` cuts
blocks into segments. Letters are those of `xla.py`; arrays are [N, block, H, feature] with N all
blocks of the batch.

Y and the inverse are float16 between the kernels: three more bits than bfloat16, for keys of a
length between 1e-3 and 1e4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.devices import split_by_xla
from pallas_kernels.gated_delta.gpu.fold import fold
from pallas_kernels.gated_delta.gpu.gradients import gradients
from pallas_kernels.gated_delta.gpu.scan import chunk_states, maps
from pallas_kernels.gated_delta.gpu.segments import cut
from pallas_kernels.gated_delta.gpu.solve import solve
from pallas_kernels.gated_delta.gpu.tiles import CHUNK, SLICE
from pallas_kernels.gated_delta.plan import Plan

_MOST_VALUES = 512  # rows of a cotangent that fit shared memory


class Residuals(NamedTuple):
    """Kept for the backward pass: inputs, what `solve` and `maps` make of them, S^T of segments."""

    k: Array
    v: Array
    g: Array
    beta: Array
    y: Array
    gates: Array
    u: Array
    matrices: Array
    sizes: Array
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
    if v.shape[3] > _MOST_VALUES:
        return f"needs at most {_MOST_VALUES} features a value; v has {v.shape[3]}"
    return None if plan.interpret else split_by_xla()


def states(plan: Plan, k: Array, v: Array, g: Array, beta: Array, initial_state: Array) -> Array:
    """States at the boundaries of blocks."""
    y, gates = _solve(plan, k, g, beta, backward=False)
    return _block_states(plan, k, v, y, gates, initial_state, backward=False)[0]


def forward(
    plan: Plan, k: Array, v: Array, g: Array, beta: Array, initial_state: Array
) -> tuple[Array, Residuals]:
    """States at the boundaries of blocks, and what the backward pass needs."""
    y, gates, u = _solve(plan, k, g, beta, backward=True)
    parts = _block_states(plan, k, v, y, gates, initial_state, backward=True)
    out, matrices, sizes, starts = parts
    return out, Residuals(k, v, g, beta, y, gates, u, matrices, sizes, starts)


def _solve(plan: Plan, k: Array, g: Array, beta: Array, *, backward: bool) -> tuple[Array, ...]:
    # As one array: XLA turns it in half the time of two.
    rows = _chunks(_split(plan, jnp.concatenate([g, beta], 2)))
    rows = rows.reshape(len(rows), 2, k.shape[2], *rows.shape[2:])
    return solve(_split(plan, k), rows, backward=backward, interpret=plan.interpret)


def _block_states(
    plan: Plan,
    k: Array,
    v: Array,
    y: Array,
    gates: Array,
    initial_state: Array,
    *,
    backward: bool,
) -> tuple[Array, Array, Array, Array]:
    """States at the boundaries of blocks; A^T of all segments in parts, and S^T between them."""
    batch, static = len(k), {"interpret": plan.interpret}
    k, v, start = _split(plan, k), _split(plan, v), initial_state.mT
    segments = cut(k, v, batch, backward=backward)
    sequential = {"segments": segments, "weighted": not backward}
    parts = maps(k, y, v, gates, start, **sequential, **static)
    matrices, sizes, added = (x.reshape(batch, -1, *x.shape[1:]) for x in parts)
    states = fold(matrices, sizes, added, start, reverse=False, **static)
    return states[:, :: segments.count].mT, matrices, sizes, states


def backward(plan: Plan, res: Residuals, dstates: Array) -> tuple[Array, ...]:
    """Gradients of k, v, g, beta and initial_state."""
    k, v, static = _split(plan, res.k), _split(plan, res.v), {"interpret": plan.interpret}
    segments = cut(k, v, len(res.k), backward=True)
    # Between the boundaries of blocks no cotangent comes in.
    between = (0, segments.count - 1, segments.count - 1)
    added = lax.pad(dstates[:, :-1].mT, 0.0, ((0, 0, 0), between, *((0, 0, 0),) * 3))
    ends = fold(res.matrices, res.sizes, added, dstates[:, -1].mT, reverse=True, **static)
    static["segments"] = segments
    states = chunk_states(k, res.y, v, res.gates, res.states, **static)
    tokens = k, res.y, res.u, v, res.gates
    dk, dv, rows, first = gradients(*tokens, states, ends, **static)
    dbeta, dg = (_tokens(rows[..., i, :], k.shape[1]) for i in (0, 1))
    dtokens = zip((dk, dv, dg, dbeta), res[:4], strict=True)
    return (*(_join(plan, d, x) for d, x in dtokens), dstates[:, 0] + first.mT)


def _split(plan: Plan, x: Array) -> Array:
    """[B, T, H, ...] -> [N, block, H, ...]; tokens to a multiple of 8 are zeros: the identity."""
    x = x.reshape(-1, plan.block_size, *x.shape[2:])
    return jnp.pad(x, ((0, 0), (0, -plan.block_size % 8), *((0, 0),) * (x.ndim - 2)))


def _chunks(x: Array) -> Array:
    """[N, block, H] -> [N, H, chunks, 64], filled up with zeros: tokens that are the identity."""
    blocks, block, heads = x.shape
    x = jnp.pad(x, ((0, 0), (0, -block % CHUNK), (0, 0)))
    return jnp.moveaxis(x, 2, 1).reshape(blocks, heads, -1, CHUNK)


def _tokens(x: Array, block: int) -> Array:
    """The inverse of _chunks."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1)[..., :block], 1, 2)


def _join(plan: Plan, x: Array, like: Array) -> Array:
    return x[:, : plan.block_size].reshape(like.shape).astype(like.dtype)
