"""Numbers of tokens as kernels want them."""

import jax.numpy as jnp
from jax import Array


def padded(x: Array, multiple: int) -> Array:
    """[B, T, H, D] with zeros after its tokens, up to a multiple."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def visible(key_length: Array | None, batch: int, keys: int) -> Array:
    """Visible keys of each batch entry, int32 [B], from 0 to Tk."""
    if key_length is None:
        return jnp.full(batch, keys, jnp.int32)
    return jnp.clip(key_length, 0, keys).astype(jnp.int32)
