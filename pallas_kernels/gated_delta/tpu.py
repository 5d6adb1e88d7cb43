"""The gated delta rule as Pallas kernels for TPUs."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.gated_delta import tpu_backward, tpu_forward
from pallas_kernels.gated_delta.plan import Plan


def obstacle(plan: Plan, k: Array, v: Array) -> str | None:
    if not plan.interpret and jax.default_backend() != "tpu":
        return f"needs a TPU; the device is {jax.default_backend()}"
    if k.dtype == jnp.float64:
        return "takes float32 and bfloat16 keys; k is float64"
    if k.shape[-1] % 128 or v.shape[-1] % 128:
        return f"takes head dims that are multiples of 128; K is {k.shape[-1]}, V {v.shape[-1]}"
    if plan.chunk_size not in (None, 64, 128):
        return f"takes chunks of 64 or 128 tokens; chunk_size is {plan.chunk_size}"
    return None


def forward(plan, k, v, g, beta, initial_state):
    ends = tpu_forward.block_ends(plan, k, v, g, beta, initial_state)
    states = jnp.concatenate([initial_state[:, None], ends], 1)
    return states, (k, v, g, beta, initial_state)


def backward(plan, res, dstates):
    matrices = tpu_forward.chunk_matrices(plan, *res)
    return tpu_backward.gradients(plan, *res[:4], matrices, dstates)
