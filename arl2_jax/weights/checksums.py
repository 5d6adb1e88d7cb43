"""A checksum of weights in memory, which does not depend on their placement."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from arl2_jax.models import Params

# Two sums of 32 bits: of 2^64 changed arrays, one keeps both.
_SEEDS = (0, 0x5BD1E995)


def checksum(params: Params) -> str:
    """Return a checksum of the values of weights.

    Sums of integers do not depend on their order, hence not on the mesh, the sharding or the kind
    of device. Every device sums its own part; nothing is gathered.

    Args:
      params: nested dict of arrays of at most 32 bits, numpy's or jax's. On several hosts, every
        process makes the same call and gets the same result.

    Returns:
      16 hex digits, a hash of the path, shape, type and values of every array.
    """
    flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
    digest = hashlib.sha256()
    for path in sorted(flat):
        leaf = flat[path]
        # One at a time: on a mesh of CPU devices, two sums at once could wait for each other.
        values = [int(value) for value in _sums(leaf)]
        digest.update(f"{path} {leaf.shape} {np.dtype(leaf.dtype).name} {values}\n".encode())
    return digest.hexdigest()[:16]


@jax.jit
def _sums(x: jax.Array) -> tuple[jax.Array, ...]:
    """Sum a hash of the bits and index of every element; the sums are replicated."""
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # Numbered by the whole array's shape, so that every device knows its elements' places.
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    hashes = (_mix(bits ^ _mix(place ^ np.uint32(seed))) for seed in _SEEDS)
    return tuple(jnp.sum(found, dtype=jnp.uint32) for found in hashes)


def _mix(x: jax.Array) -> jax.Array:
    """Apply the finalizer of MurmurHash3: every bit of x changes half of the bits."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
