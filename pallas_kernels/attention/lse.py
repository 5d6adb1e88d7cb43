"""Gradients of the kernels that return output and log-sum-exp."""

from collections.abc import Callable
from functools import partial

import jax
from jax import Array

from pallas_kernels.attention import xla


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def with_lse(
    attend: Callable[..., tuple[Array, Array]],
    q: Array,
    k: Array,
    v: Array,
    key_length: Array | None,
    layer: Array | None,
) -> tuple[Array, Array]:
    """Call `attend`, a backend's `attention_with_lse`, and make its (out, lse) differentiable.

    The gradients are those of XLA's form, through both results. It recomputes the scores and keeps
    them in memory.
    """
    return attend(q, k, v, key_length, layer)


def _forward(attend, q, k, v, key_length, layer):
    return attend(q, k, v, key_length, layer), (q, k, v, key_length, layer)


def _backward(attend, inputs, cotangents):
    del attend
    q, k, v, key_length, layer = inputs
    form = lambda q, k, v: xla.attention_with_lse(q, k, v, key_length, layer)
    _, vjp = jax.vjp(form, q, k, v)
    return *vjp(cotangents), None, None


with_lse.defvjp(_forward, _backward)
