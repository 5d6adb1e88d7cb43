"""The teacher's memory: keys and values of every token so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from arl2_jax.config import ModelConfig
from arl2_jax.memory.interface import Projections
from arl2_jax.nn.rope import rotate
from pallas_kernels import dot_product_attention


class CacheState(NamedTuple):
    """Keys (rotated) and values of the past in slots of fixed number, [B, capacity, H, D]."""

    k: Float[Array, "b capacity h d"]
    v: Float[Array, "b capacity h d"]


class SoftmaxCache(nnx.Module):
    """Softmax over the whole past and the block itself; the state grows with the video."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        del rngs  # no parameters
        self.heads, self.head_dim, self.dtype = cfg.num_heads, cfg.head_dim, jnp.dtype(cfg.dtype)

    def init_state(self, batch, capacity):
        """Zeroed slots for `capacity` tokens."""
        shape = (batch, capacity, self.heads, self.head_dim)
        return CacheState(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def write(self, p: Projections, state: CacheState, position) -> CacheState:
        """Fills the block's slots, which start at `position`."""
        start = (0, position, 0, 0)
        k = rotate(p.k, p.rope).astype(state.k.dtype)
        return CacheState(
            jax.lax.dynamic_update_slice(state.k, k, start),
            jax.lax.dynamic_update_slice(state.v, p.v.astype(state.v.dtype), start),
        )

    def attend(self, p: Projections, state: CacheState, position):
        """Attends to the slots before `position` and to the block itself."""
        seen = self.write(p, state, position)
        q = rotate(p.q, p.rope)
        return dot_product_attention(q, seen.k, seen.v, key_length=position + q.shape[1])

    def attend_clip(self, p: Projections, blocks, halves):
        """One call a block, so that no score of an invisible key is ever computed."""
        halved = lambda x: x.reshape(x.shape[0], halves, -1, *x.shape[2:])
        split = lambda x: x.reshape(*x.shape[:2], blocks, -1, *x.shape[3:])
        q, k = (split(rotate(halved(x), p.rope)) for x in (p.q, p.k))
        v = split(halved(p.v))  # each [B, halves, blocks, n, H, D]
        outputs = []
        for i in range(blocks):
            keys, values = _visible(k, i), _visible(v, i)
            queries = q[:, :, i].reshape(-1, *q.shape[3:])
            outputs.append(dot_product_attention(queries, keys, values))
        out = jnp.stack(outputs, axis=1)  # [B * halves, blocks, n, H, D]
        return out.reshape(p.q.shape), {}


def _visible(x: Array, i: int) -> Array:
    """What each half of block i sees.

    [B, halves, blocks, n, ...] -> [B * halves, (i + 1) n, ...]
    """
    batch, halves = x.shape[:2]
    past = jnp.broadcast_to(x[:, :1, :i], (batch, halves, i, *x.shape[3:]))
    seen = jnp.concatenate([past, x[:, :, i : i + 1]], axis=2)
    return seen.reshape(batch * halves, -1, *x.shape[4:])
