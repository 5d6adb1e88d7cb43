"""Softmax attention by cuDNN, through JAX."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention.layers import of_layer
from pallas_kernels.attention.lengths import padded, visible


def unsupported_reason(q: Array) -> str | None:
    """Return why cuDNN cannot take these queries here, or None."""
    if missing := no_nvidia():
        return missing
    major = int(jax.devices()[0].compute_capability.split(".")[0])
    if major < 8:
        return f"needs compute capability 8.0; the device has {major}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16; q has {q.dtype}"
    largest = 256 if major >= 9 else 128
    if q.shape[-1] % 8 or q.shape[-1] > largest:
        return f"needs a head dimension in multiples of 8 up to {largest}; q has {q.shape[-1]}"
    return None


def attention(
    q: Array, k: Array, v: Array, key_length: Array | None, layer: Array | None = None
) -> Array:
    """Compute attention, with cuDNN's gradients; lengths are int32 [B]."""
    queries = q.shape[1]
    q, k, v, key_length = _even(q, *of_layer(k, v, layer), key_length)
    # cuDNN leaves undefined what rows without visible keys give; they are shown a key, and zeroed.
    shown = None if key_length is None else jnp.maximum(key_length, 1)
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=shown, implementation="cudnn")
    if key_length is not None:
        out = jnp.where((key_length > 0)[:, None, None, None], out, 0)
    return out[:, :queries]


def attention_with_lse(
    q: Array, k: Array, v: Array, key_length: Array | None, layer: Array | None = None
) -> tuple[Array, Array]:
    """Compute attention and the float32 log-sum-exp [B, Tq, H] of cuDNN's backward pass."""
    # jax.nn.dot_product_attention rounds it to the dtype of q; this function, which it calls, does
    # not.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    queries = q.shape[1]
    q, k, v, key_length = _even(q, *of_layer(k, v, layer), key_length)
    options: dict[str, Any] = {"scale": 1 / math.sqrt(q.shape[-1]), "return_residual": True}
    if key_length is not None:
        options["q_seqlen"] = jnp.full(len(q), q.shape[1], jnp.int32)
        options["kv_seqlen"] = key_length
        options["mask_type"] = MaskType.PADDING
    found: Any = dot_product_attention(q, k, v, **options)
    out, lse = found[0][:, :queries], found[1].swapaxes(1, 2)[:, :queries]
    if key_length is not None:
        # cuDNN does not define the result of rows without visible keys.
        shown = (key_length > 0)[:, None, None]
        out = jnp.where(shown[..., None], out, 0)
        lse = jnp.where(shown, lse, -jnp.inf)
    return out, lse


def _even(q: Array, k: Array, v: Array, key_length: Array | None):
    """Pad to even numbers of tokens, which JAX requires for differentiation."""
    batch, keys = k.shape[:2]
    if keys % 2:
        key_length = visible(key_length, batch, keys)
    return *(padded(x, 2) for x in (q, k, v)), key_length


def no_nvidia() -> str | None:
    """Return why there is no NVIDIA GPU to use, or None."""
    device = jax.devices()[0]
    if jax.default_backend() == "gpu" and "cuda" in device.client.platform_version:
        return None
    return f"needs an NVIDIA GPU; the device is {device.device_kind}"
