"""The teacher's memory: keys and values of every token so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from arl2_jax.config import ModelConfig
from arl2_jax.memory.clip_attention import attend_blocks
from arl2_jax.memory.interface import Projections
from arl2_jax.nn.attention import attention
from arl2_jax.nn.rope import rotate
from arl2_jax.sharding import BLOCKS, CLIPS, HEADS, lay_out, per_device


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
        return attention(q, seen.k, seen.v, position + q.shape[1])

    def attend_clip(self, p: Projections, blocks, copies):
        """All blocks at once: every copy sees the clean blocks before its own, and its own."""
        by_block = PartitionSpec(CLIPS, None, BLOCKS, None, HEADS)
        by_head = PartitionSpec(CLIPS, None, None, None, (HEADS, BLOCKS))
        split = lambda x: lay_out(
            x.reshape(-1, copies, blocks, x.shape[1] // blocks, *x.shape[2:]), by_block
        )
        q, k, v = map(split, (rotate(p.q, p.rope), rotate(p.k, p.rope), p.v))
        # Every block sees all before it. So the devices that had shared out the blocks share out
        # the heads: q, k, v and then the output move between them (all-to-all).
        out = per_device(attend_blocks, (by_head,) * 3, by_head)(q, k, v)
        return lay_out(out, by_block).reshape(p.q.shape), {}
