"""Softmax attention: cuDNN where it applies, XLA elsewhere."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

Implementation = Literal["xla", "cudnn"]


def dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    key_length: ArrayLike | None = None,
    implementation: Implementation | None = None,
) -> Array:
    """Bidirectional softmax attention, optionally over the filled part of a key buffer.

        out = softmax(q k^T / sqrt(D)) v

    Args:
        q: Queries [B, Tq, H, D], floating point.
        k: Keys [B, Tk, H, D], in the dtype of q.
        v: Values [B, Tk, H, D], in the dtype of q.
        key_length: Visible keys, an integer scalar or [B], possibly traced; None means all. Keys
            and values past it have no influence; cuDNN needs them finite (it multiplies the rest
            of a tile by zero), XLA does not. With no visible key the output is zero.
        implementation: "xla", "cudnn" (NVIDIA GPUs, half precision; cost follows key_length), or
            None for cuDNN where it applies and XLA elsewhere. A named one never falls back.

    Returns:
        [B, Tq, H, D] in the dtype of q.

    Raises:
        ValueError: A shape, dtype or option is none of the above.
        NotImplementedError: The named implementation cannot do this here.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    _check(q, k, v, implementation)
    if key_length is not None:
        key_length = _check_length(key_length, len(q))
    obstacle = _cudnn_obstacle(q)
    if implementation == "cudnn" and obstacle:
        raise NotImplementedError(f"implementation 'cudnn' {obstacle}")
    if implementation == "xla" or obstacle:
        return _xla(q, k, v, key_length)
    return _cudnn(q, k, v, key_length)


def _cudnn(q: Array, k: Array, v: Array, key_length: Array | None) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=key_length, implementation="cudnn"
    )


def _xla(q: Array, k: Array, v: Array, key_length: Array | None) -> Array:
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


def _cudnn_obstacle(q: Array) -> str | None:
    """Why cuDNN cannot take these queries here, or None."""
    if jax.default_backend() != "gpu" or "cuda" not in jax.devices()[0].client.platform_version:
        return f"needs an NVIDIA GPU; the device is {jax.devices()[0].device_kind}"
    major = int(jax.devices()[0].compute_capability.split(".")[0])
    if major < 8:
        return f"needs compute capability 8.0; the device has {major}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16; q has {q.dtype}"
    largest = 256 if major >= 9 else 128
    if q.shape[-1] % 8 or q.shape[-1] > largest:
        return f"needs a head dimension in multiples of 8 up to {largest}; q has {q.shape[-1]}"
    return None


def _check(q: Array, k: Array, v: Array, implementation: str | None) -> None:
    if q.ndim != 4:
        raise ValueError(f"q has shape {q.shape}; must be [B, Tq, H, D]")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q has dtype {q.dtype}; must be floating point")
    batch, _, heads, dim = q.shape
    if k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (batch, heads, dim):
        raise ValueError(
            f"k has shape {k.shape}; must be [B, Tk, H, D] with B, H, D as in q {q.shape}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape}; must be that of k, {k.shape}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; must be that of q, {q.dtype}")
    if implementation is not None and implementation not in get_args(Implementation):
        names = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation is {implementation!r}; must be None or one of {names}")


def _check_length(key_length: ArrayLike, batch: int) -> Array:
    length = jnp.asarray(key_length)
    if not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(f"key_length has dtype {length.dtype}; must be an integer")
    if length.shape not in ((), (batch,)):
        raise ValueError(f"key_length has shape {length.shape}; must be scalar or [B] = ({batch},)")
    return jnp.broadcast_to(length, (batch,)).astype(jnp.int32)
