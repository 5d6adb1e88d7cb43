"""Softmax attention under the current mesh."""

import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from arl2_jax.sharding import BLOCKS, CLIPS, HEADS, per_device
from pallas_kernels import dot_product_attention

_QUERIES = PartitionSpec(CLIPS, BLOCKS, HEADS)
_KEYS = PartitionSpec(CLIPS, None, HEADS)
_STACK = PartitionSpec(None, *_KEYS)

Partial = tuple[Float[Array, "b n h d"], Float[Array, "b n h"]]


def attention(
    q: Float[Array, "b n h d"], k: Float[Array, "b m h d"], v: Float[Array, "b m h d"]
) -> Float[Array, "b n h d"]:
    """Compute `dot_product_attention`, sharded by clips, queries and heads."""
    return per_device(dot_product_attention, (_QUERIES, _KEYS, _KEYS), _QUERIES)(q, k, v)


def partial_attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "*layers b m h d"],
    v: Float[Array, "*layers b m h d"],
    key_length: int | Int[Array, ""] | None = None,
    layer: Int[Array, ""] | None = None,
) -> Partial:
    """Attend to a subset of the keys; return (output, log-sum-exp) for `merge_attention`.

    Args:
      q: queries.
      k, v: keys and values; with `layer`, those of a run of layers, [layers, B, m, H, D].
      key_length: number of visible keys; by default all.
      layer: index of the layer whose keys to use; they are read in place if the device can.
    """
    length = k.shape[-3] if key_length is None else key_length

    def attend(q, k, v, length, *layer):
        return dot_product_attention(
            q, k, v, key_length=length, layer=layer[0] if layer else None, return_lse=True
        )

    keys = _KEYS if layer is None else _STACK
    scalars = (jnp.asarray(length, jnp.int32), *(() if layer is None else (layer,)))
    inputs = (_QUERIES, keys, keys, *(PartitionSpec(),) * len(scalars))
    return per_device(attend, inputs, (_QUERIES, _QUERIES))(q, k, v, *scalars)
