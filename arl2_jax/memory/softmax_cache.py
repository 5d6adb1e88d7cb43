"""The teacher's memory: keys and values of every token so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from arl2_jax.config import AttentionConfig, MemorySettings
from arl2_jax.memory.clip_attention import attend_blocks
from arl2_jax.memory.interface import Projections, Room
from arl2_jax.nn.attention import partial_attention
from arl2_jax.nn.positions import TokenGrid
from arl2_jax.nn.rope import rotate
from arl2_jax.sharding import BLOCKS, CLIPS, HEADS, constrain, per_device
from pallas_kernels import merge_attention


class CacheState(NamedTuple):
    """Keys (rotated) and values of the past in slots of fixed number, [B, capacity, H, D]."""

    k: Float[Array, "*layers b _ h d"]
    v: Float[Array, "*layers b _ h d"]


class SoftmaxCache(nnx.Module):
    """Softmax over the whole past and the block itself; the state grows with the video.

    A pass attends to the cache and to its own block separately and merges both, so that it does not
    write to the cache. A finished block is written once, in place.
    """

    bounded = False
    stacked = True
    gathers = False

    def __init__(self, settings: MemorySettings, cfg: AttentionConfig, *, rngs: nnx.Rngs):
        del settings, rngs  # it has neither
        self.heads, self.head_dim, self.dtype = cfg.num_heads, cfg.head_dim, jnp.dtype(cfg.dtype)

    def init_state(self, batch: int, room: Room) -> CacheState:
        """Return zeroed slots for all tokens of a video; none if no end is known."""
        shape = (batch, (room.frames or 0) * room.tokens_per_frame, self.heads, self.head_dim)
        return CacheState(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))

    def attend(self, p: Projections, state: CacheState, grid: TokenGrid):
        """Attend to the tokens before the block and to the block itself; no aux."""
        rope = grid.rotation()
        q, k = rotate(p.q, rope), rotate(p.k, rope)
        past = partial_attention(q, state.k, state.v, grid.first_token, grid.layer)
        return merge_attention([past, partial_attention(q, k, p.v)])[0], None

    def entries(self, p: Projections, grid: TokenGrid) -> CacheState:
        """Return rotated keys, and values, of the block."""
        return CacheState(rotate(p.k, grid.rotation()).astype(self.dtype), p.v.astype(self.dtype))

    def put(self, entries: CacheState, state: CacheState, grid: TokenGrid) -> CacheState:
        """Fill the block's slots."""
        start = (*(0,) * (state.k.ndim - 3), grid.first_token, 0, 0)
        return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice(x, y, start), state, entries)

    def write(self, p: Projections, aux: None, state: CacheState, grid: TokenGrid) -> CacheState:
        """Return one layer's state with the block."""
        del aux
        return self.put(self.entries(p, grid), state, grid)

    def attend_clip(self, p: Projections, grid: TokenGrid, blocks: int, copies: int):
        """Attend in all blocks at once: each copy sees the clean blocks before, and its own."""
        by_block = PartitionSpec(CLIPS, None, BLOCKS, None, HEADS)
        by_head = PartitionSpec(CLIPS, None, None, None, (HEADS, BLOCKS))
        split = lambda x: constrain(
            x.reshape(-1, copies, blocks, x.shape[1] // blocks, *x.shape[2:]), by_block
        )
        rope = grid.rotation()
        q, k, v = map(split, (rotate(p.q, rope), rotate(p.k, rope), p.v))
        # Every block sees all before it. So the devices that split the blocks split the heads
        # instead: q, k, v and then the output are exchanged (all-to-all).
        out = per_device(attend_blocks, (by_head,) * 3, by_head)(q, k, v)
        return constrain(out, by_block).reshape(p.q.shape), {}
