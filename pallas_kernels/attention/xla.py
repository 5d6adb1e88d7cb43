"""Softmax attention in plain JAX, for any device and dtype; holds all scores at once."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax


def obstacle(q: Array) -> None:
    """None: there is none."""
    del q


def attention(q: Array, k: Array, v: Array, key_length: Array | None) -> Array:
    """Attention; lengths are int32 [B]."""
    accumulate = jnp.promote_types(q.dtype, jnp.float32)
    # float32 operands are multiplied as float32, also on TPUs and with TF32 at hand.
    precision = lax.Precision.HIGHEST if q.dtype == accumulate else lax.Precision.DEFAULT
    product = {"precision": precision, "preferred_element_type": accumulate}
    visible = None
    if key_length is not None:
        visible = jnp.arange(k.shape[1]) < key_length[:, None]
        # A masked score stops what k holds there in the output, but not in the gradient of q.
        k, v = (jnp.where(visible[:, :, None, None], x, 0) for x in (k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, **product) / math.sqrt(q.shape[-1])
    if visible is not None:
        scores = jnp.where(visible[:, None, None, :], scores, jnp.finfo(accumulate).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, **product).astype(q.dtype)
