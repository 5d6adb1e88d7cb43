"""The public gated delta rule: choice of an implementation, derivative."""

import importlib
import itertools
import logging
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.gated_delta import reference
from pallas_kernels.gated_delta.checks import (
    Implementation,
    Precision,
    check_options,
    check_state,
    check_tokens,
    state_dtype,
)
from pallas_kernels.gated_delta.plan import Plan

# Modules of this folder, the fastest first. Each has `states`; `forward`, which also returns what
# its `backward` needs; and `unsupported_reason`, which returns why it cannot take a call, or None.
_BACKENDS = ("gpu", "tpu", "xla")
_LOG = logging.getLogger("pallas_kernels")


def gated_delta_states(
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    initial_state: Array | None = None,
    *,
    block_size: int,
    implementation: Implementation | None = None,
    precision: Precision = "default",
    chunk_size: int | None = None,
) -> Array:
    """Return the states of the gated delta rule at the boundaries of blocks of tokens.

    For each token t in order, S a K x V matrix per batch entry and head:

        S <- exp(g_t) S
        S <- S + beta_t k_t (v_t - S^T k_t)^T

    Differentiable in all five arrays; gradients have the dtype of their argument. The update
    contracts for g <= 0, unit keys and 0 <= beta <= 2. A token with beta = 0 and g = 0 is the
    identity; g = -1e4 forgets all before it.

    Args:
        k: Keys [B, T, H, K], float32, bfloat16 or float64.
        v: Values [B, T, H, V], in the dtype of k.
        g: Log decay [B, T, H], at most 0, in the dtype of the state.
        beta: Writing strength [B, T, H], in the dtype of the state.
        initial_state: [B, H, K, V] in the dtype of the state: float64 for float64 keys, float32
            otherwise. None means zeros.
        block_size: Tokens of a block; divides T.
        implementation: "gpu" (Pallas for NVIDIA Hopper; keys of a length between 1e-3 and 1e4),
            "tpu" (Pallas for TPUs), "xla" (anywhere), "reference" (token by token, plain autodiff),
            or None for the fastest that can do this here. A named one never falls back.
        precision: "default" multiplies bfloat16 keys and values as bfloat16 with float32 sums;
            "high" multiplies them in three bfloat16 passes, or in float32. float32 products are
            never rounded to bfloat16 or TF32 for float32 keys. The reference always computes in
            the state's dtype.
        chunk_size: Tokens turned into one matrix product at most, a multiple of 8. None leaves it
            to the implementation.

    XLA cannot split "gpu" and "tpu" over devices: under a mesh they need `jax.shard_map`, and with
    tokens split over an axis of it `context_parallel.gated_delta_states`.

    Returns:
        States [B, T / block_size + 1, H, K, V]: before each block, and after the last.

    Raises:
        ValueError: A shape, dtype or option is none of the above, or a concrete g is positive.
        NotImplementedError: The named implementation cannot do this here.

    Source: ARL2, arXiv 2605.16579; the gated delta rule, arXiv 2412.06464.
    """
    k, v, g, beta = (jnp.asarray(x) for x in (k, v, g, beta))
    check_options(implementation, precision, chunk_size)
    check_tokens(k, v, g, beta, block_size)
    if initial_state is None:
        # Made from k, so that it varies over a device mesh as k does.
        zeros = jnp.zeros_like(k[:, 0, :, :, None], state_dtype(k))
        initial_state = jnp.broadcast_to(zeros, (*zeros.shape[:-1], v.shape[-1]))
    initial_state = jnp.asarray(initial_state)
    check_state(k, v, initial_state)
    if implementation == "reference":
        return reference.gated_delta_states(k, v, g, beta, initial_state, block_size=block_size)
    operand = k.dtype if precision == "default" else state_dtype(k)
    plan = Plan(block_size, chunk_size, jnp.dtype(operand), state_dtype(k))
    backend = implementation or _fastest(plan, k, v)
    if reason := _module(backend).unsupported_reason(plan, k, v):
        raise NotImplementedError(f"implementation {backend!r} {reason}")
    return states_by(backend, plan, k, v, g, beta, initial_state)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def states_by(backend: str, plan: Plan, *inputs: Array) -> Array:
    """Return the states by a named implementation; unchecked inputs as in the public function."""
    return _module(backend).states(plan, *inputs)


def _states_forward(backend: str, plan: Plan, *inputs: Array) -> tuple[Array, Any]:
    return _module(backend).forward(plan, *inputs)


def _states_backward(backend: str, plan: Plan, residuals: Any, dstates: Array) -> tuple[Array, ...]:
    return _module(backend).backward(plan, residuals, dstates)


states_by.defvjp(_states_forward, _states_backward)


def _module(backend: str) -> Any:
    # Imported when first used: Pallas's compilers are not needed everywhere.
    return importlib.import_module(f"pallas_kernels.gated_delta.{backend}")


def _fastest(plan: Plan, k: Array, v: Array) -> str:
    platform = jax.default_backend()
    names = [name for name in _BACKENDS if name in (platform, "xla")]
    reasons = [(name, _module(name).unsupported_reason(plan, k, v)) for name in names]
    passed_over = list(itertools.takewhile(lambda pair: pair[1], reasons))
    backend = names[len(passed_over)]
    _log_choice(backend, platform, *(" ".join(pair) for pair in passed_over))
    return backend


@cache
def _log_choice(backend: str, platform: str, *passed_over: str) -> None:
    _LOG.info("; ".join((f"gated_delta_states: {backend} on {platform}", *passed_over)))
