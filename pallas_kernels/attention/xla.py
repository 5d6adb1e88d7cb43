"""Softmax attention in plain JAX, for any device and dtype; holds all scores at once."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.attention.layers import of_layer
from pallas_kernels.attention.lengths import visible


def unsupported_reason(q: Array) -> None:
    """Return None: this form takes all queries."""
    del q


def attention(
    q: Array, k: Array, v: Array, key_length: Array | None, layer: Array | None = None
) -> Array:
    """Compute attention; lengths are int32 [B]."""
    scores, v = _scores(q, *of_layer(k, v, layer), key_length)
    return _mix(scores, v)


def attention_with_lse(
    q: Array, k: Array, v: Array, key_length: Array | None, layer: Array | None = None
) -> tuple[Array, Array]:
    """Compute attention and the log-sum-exp of visible scores, float32 [B, Tq, H]."""
    scores, v = _scores(q, *of_layer(k, v, layer), key_length)
    batch, keys = v.shape[:2]
    if keys == 0:
        return _mix(scores, v), jnp.full(q.shape[:3], -jnp.inf, jnp.float32)
    # Hidden scores are finite, so that the gradient of a row without visible keys is.
    lse = jax.nn.logsumexp(scores, axis=-1).swapaxes(1, 2).astype(jnp.float32)
    shown = visible(key_length, batch, keys)[:, None, None] > 0
    return _mix(scores, v), jnp.where(shown, lse, -jnp.inf)


def _scores(q: Array, k: Array, v: Array, key_length: Array | None) -> tuple[Array, Array]:
    """Return scaled scores [B, H, Tq, Tk], and values with zeros in hidden slots."""
    hidden = None
    if key_length is not None:
        hidden = jnp.arange(k.shape[1]) >= key_length[:, None]
        # A masked score keeps hidden k out of the output, but not out of the gradient of q.
        k, v = (jnp.where(hidden[:, :, None, None], 0, x) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, **_product(q)) / math.sqrt(q.shape[-1])
    if hidden is not None:
        scores = jnp.where(hidden[:, None, None, :], jnp.finfo(scores.dtype).min, scores)
    return scores, v


def _mix(scores: Array, v: Array) -> Array:
    """Weight values by the softmax of the scores, in the dtype of v."""
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, **_product(v)).astype(v.dtype)


def _product(x: Array) -> dict[str, Any]:
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    # float32 operands are multiplied as float32, also on TPUs and on GPUs with TF32.
    precision = lax.Precision.HIGHEST if x.dtype == accumulate else lax.Precision.DEFAULT
    return {"precision": precision, "preferred_element_type": accumulate}
