"""Softmax attention by cuDNN, through JAX."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention.lengths import padded, visible


def obstacle(q: Array) -> str | None:
    """Why cuDNN cannot take these queries here, or None."""
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


def attention(q: Array, k: Array, v: Array, key_length: Array | None) -> Array:
    """Attention and its gradients; lengths are int32 [B]."""
    queries, keys = q.shape[1], k.shape[1]
    # JAX takes no odd numbers of tokens where it is differentiated.
    if keys % 2:
        key_length = visible(k, key_length)
    q, k, v = (padded(x, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=key_length, implementation="cudnn"
    )
    return out[:, :queries]


def no_nvidia() -> str | None:
    """What is there instead of an NVIDIA GPU, or None."""
    device = jax.devices()[0]
    if jax.default_backend() == "gpu" and "cuda" in device.client.platform_version:
        return None
    return f"needs an NVIDIA GPU; the device is {device.device_kind}"
