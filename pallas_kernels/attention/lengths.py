"""Numbers of tokens in the form that kernels take."""

import jax.numpy as jnp
from jax import Array


def padded(x: Array, multiple: int) -> Array:
    """Pad the tokens of [B, T, H, D] with zeros to a multiple."""
    missing = -x.shape[1] % multiple
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def visible(key_length: Array | None, batch: int, keys: int) -> Array:
    """Return the visible keys of each batch entry, int32 [B], from 0 to Tk."""
    if key_length is None:
        return jnp.full(batch, keys, jnp.int32)
    return jnp.clip(key_length, 0, keys).astype(jnp.int32)
