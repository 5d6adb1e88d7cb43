"""The gated delta rule on NVIDIA Hopper GPUs, in Pallas (Mosaic GPU).

Forward: Y of all chunks at once (`solve`), the affine maps of segments of chunks (`scan`), and
their fold in order (`fold`). Backward: the fold of cotangents through the same maps, the states
before all chunks (`scan`), and the gradients, segment by segment backwards (`gradients`).
`segments` divides blocks into segments. Names are those of `xla.py`; arrays are
[N, block, H, feature], where N counts all blocks of the batch.

Y and the inverse are float16 between the kernels: three more bits than bfloat16, for keys of a
length between 1e-3 and 1e4.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.devices import unsupported_mesh_reason
from pallas_kernels.gated_delta.gpu.fold import fold
from pallas_kernels.gated_delta.gpu.gradients import gradients
from pallas_kernels.gated_delta.gpu.scan import chunk_states, maps
from pallas_kernels.gated_delta.gpu.segments import plan_segments
from pallas_kernels.gated_delta.gpu.solve import solve
from pallas_kernels.gated_delta.gpu.tiles import CHUNK, SLICE
from pallas_kernels.gated_delta.plan import Plan

_MOST_VALUES = 512  # rows of a cotangent that fit shared memory


class Residuals(NamedTuple):
    """Inputs, results of `solve` and `maps`, and S^T of segments, for the backward pass."""

    k: Array
    v: Array
    g: Array
    beta: Array
    y: Array
    gates: Array
    u: Array
    matrices: Array
    row_scales: Array
    states: Array


def unsupported_reason(plan: Plan, k: Array, v: Array) -> str | None:
    """Return why these kernels cannot take a call, or None."""
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
    return None if plan.interpret else unsupported_mesh_reason()


def states(plan: Plan, k: Array, v: Array, g: Array, beta: Array, initial_state: Array) -> Array:
    """Return states at the boundaries of blocks."""
    y, gates = _solve(plan, k, g, beta, backward=False)
    return _block_states(plan, k, v, y, gates, initial_state, backward=False)[0]


def forward(
    plan: Plan, k: Array, v: Array, g: Array, beta: Array, initial_state: Array
) -> tuple[Array, Residuals]:
    """Return states at the boundaries of blocks, and residuals for the backward pass."""
    y, gates, u = _solve(plan, k, g, beta, backward=True)
    parts = _block_states(plan, k, v, y, gates, initial_state, backward=True)
    out, matrices, row_scales, starts = parts
    return out, Residuals(k, v, g, beta, y, gates, u, matrices, row_scales, starts)


def _solve(plan: Plan, k: Array, g: Array, beta: Array, *, backward: bool) -> tuple[Array, ...]:
    # As one array, which XLA transposes in half the time of two.
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
    """Return states at the boundaries of blocks; scaled A^T of segments, scales, S^T between."""
    batch, static = len(k), {"interpret": plan.interpret}
    k, v, start = _split(plan, k), _split(plan, v), initial_state.mT
    segments = plan_segments(k, v, batch, backward=backward)
    sequential = {"segments": segments, "weighted": not backward}
    parts = maps(k, y, v, gates, start, **sequential, **static)
    matrices, row_scales, added = (x.reshape(batch, -1, *x.shape[1:]) for x in parts)
    states = fold(matrices, row_scales, added, start, reverse=False, **static)
    return states[:, :: segments.count].mT, matrices, row_scales, states


def backward(plan: Plan, res: Residuals, dstates: Array) -> tuple[Array, ...]:
    """Return gradients of k, v, g, beta and initial_state."""
    k, v, static = _split(plan, res.k), _split(plan, res.v), {"interpret": plan.interpret}
    segments = plan_segments(k, v, len(res.k), backward=True)
    # No cotangent enters between the boundaries of blocks.
    between = (0, segments.count - 1, segments.count - 1)
    added = lax.pad(dstates[:, :-1].mT, 0.0, ((0, 0, 0), between, *((0, 0, 0),) * 3))
    ends = fold(res.matrices, res.row_scales, added, dstates[:, -1].mT, reverse=True, **static)
    static["segments"] = segments
    states = chunk_states(k, res.y, v, res.gates, res.states, **static)
    tokens = k, res.y, res.u, v, res.gates
    dk, dv, rows, first = gradients(*tokens, states, ends, **static)
    dbeta, dg = (_tokens(rows[..., i, :], k.shape[1]) for i in (0, 1))
    dtokens = zip((dk, dv, dg, dbeta), res[:4], strict=True)
    return (*(_join(plan, d, x) for d, x in dtokens), dstates[:, 0] + first.mT)


def _split(plan: Plan, x: Array) -> Array:
    """Split [B, T, H, ...] into [N, block, H, ...], blocks padded to a multiple of 8 with zeros."""
    x = x.reshape(-1, plan.block_size, *x.shape[2:])
    return jnp.pad(x, ((0, 0), (0, -plan.block_size % 8), *((0, 0),) * (x.ndim - 2)))


def _chunks(x: Array) -> Array:
    """Split [N, block, H] into [N, H, chunks, 64], padded with zeros: identity tokens."""
    blocks, block, heads = x.shape
    x = jnp.pad(x, ((0, 0), (0, -block % CHUNK), (0, 0)))
    return jnp.moveaxis(x, 2, 1).reshape(blocks, heads, -1, CHUNK)


def _tokens(x: Array, block: int) -> Array:
    """Undo `_chunks`."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1)[..., :block], 1, 2)


def _join(plan: Plan, x: Array, like: Array) -> Array:
    return x[:, : plan.block_size].reshape(like.shape).astype(like.dtype)
