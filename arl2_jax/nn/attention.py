"""Softmax attention under the mesh in use."""

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from arl2_jax.sharding import BLOCKS, CLIPS, HEADS, per_device
from pallas_kernels import dot_product_attention

_QUERIES = PartitionSpec(CLIPS, BLOCKS, HEADS)
_KEYS = PartitionSpec(CLIPS, None, HEADS)


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    key_length: int | Int[Array, ""] | None = None,
) -> Float[Array, "b n h d"]:
    """`pallas_kernels.dot_product_attention`; each device has its own clips, queries and heads."""
    if key_length is None:
        return per_device(dot_product_attention, (_QUERIES, _KEYS, _KEYS), _QUERIES)(q, k, v)
    some = lambda q, k, v, length: dot_product_attention(q, k, v, key_length=length)
    inputs = (_QUERIES, _KEYS, _KEYS, PartitionSpec())
    return per_device(some, inputs, _QUERIES)(q, k, v, jnp.asarray(key_length))
