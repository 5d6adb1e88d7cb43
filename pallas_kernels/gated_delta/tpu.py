"""The gated delta rule as two Pallas kernels for TPUs, by chunks; equations as in `xla.py`.

The backward pass runs the forward kernel again, which then writes each chunk's start state and T.
Kept from the forward pass, they would take 400 MB per layer of a seven-block Wan 1.3B clip. Written
and read at once they cost little, because the kernels are compute-bound, and the backward kernel
need not compute the inverse.
"""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.devices import unsupported_mesh_reason
from pallas_kernels.gated_delta import tpu_backward, tpu_forward
from pallas_kernels.gated_delta.plan import Plan

Residuals = tuple[Array, Array, Array, Array, Array]  # the arguments


def unsupported_reason(plan: Plan, k: Array, v: Array) -> str | None:
    """Return why the kernels cannot take a call, or None."""
    device = jax.default_backend()
    if device != "tpu" and not plan.interpret:
        return f"needs a TPU; the device is {device}"
    if k.dtype == jnp.float64:
        return "takes float32 and bfloat16; k is float64"
    if k.shape[-1] % 128 or v.shape[-1] % 128:
        return f"takes head dims that are multiples of 128; K is {k.shape[-1]}, V {v.shape[-1]}"
    if plan.chunk_size not in (None, 64, 128):
        return f"takes chunks of 64 or 128 tokens; chunk_size is {plan.chunk_size}"
    return None if plan.interpret else unsupported_mesh_reason()


def states(plan: Plan, k: Array, v: Array, g: Array, beta: Array, initial_state: Array) -> Array:
    """Return states at the boundaries of blocks."""
    ends = tpu_forward.block_ends(plan, k, v, g, beta, initial_state)
    return jnp.concatenate([initial_state[:, None], ends], 1)


def forward(
    plan: Plan, k: Array, v: Array, g: Array, beta: Array, initial_state: Array
) -> tuple[Array, Residuals]:
    """Return states at the boundaries of blocks, and the inputs as residuals."""
    inputs = (k, v, g, beta, initial_state)
    return states(plan, *inputs), inputs


def backward(plan: Plan, res: Residuals, dstates: Array) -> tuple[Array, ...]:
    """Return gradients of k, v, g, beta and initial_state."""
    matrices = tpu_forward.chunk_matrices(plan, *res)
    k, v, g, beta, _ = res
    return tpu_backward.gradients(plan, k, v, g, beta, matrices, dstates)
