"""Gates of chunks, as the kernels read them."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.gated_delta.gpu.tiles import CHUNK


def chunk_gates(g: Array, beta: Array) -> Array:
    """r, beta and gamma of every chunk, [N, H, chunks, 3, 64] float32.

    With g [N, block, H] the log decay of the tokens of N blocks: r_i = exp(sum_{j>i} g_j) over the
    tokens after i in its chunk, gamma = exp(sum_j g_j), repeated. Tokens that fill up the last
    chunk have beta = 0 and g = 0: the identity. Sums start from the end and are never differences
    of sums, which a reset of -1e4 would swallow.
    """
    g, beta = _chunks(g), _chunks(beta)
    i = jnp.arange(CHUNK)
    after = i[None, :] > i[:, None]
    r = jnp.exp(jnp.where(after, g[..., None, :], 0).sum(-1))
    gamma = jnp.exp(g.sum(-1, keepdims=True))
    return jnp.stack([r, beta, jnp.broadcast_to(gamma, r.shape)], -2)


def tokens(x: Array, block: int) -> Array:
    """[N, H, chunks, 64] -> [N, block, H]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], -1)[..., :block], 1, 2)


def _chunks(x: Array) -> Array:
    """[N, block, H] -> [N, H, chunks, 64], filled up with zeros."""
    blocks, block, heads = x.shape
    x = jnp.pad(jnp.moveaxis(x, 2, 1), ((0, 0), (0, 0), (0, -block % CHUNK)))
    return x.reshape(blocks, heads, -1, CHUNK)
