"""The teacher's memory: keys and values of every token so far."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from arl2_jax.config import ModelConfig
from arl2_jax.memory.interface import Projections
from arl2_jax.nn.attention import attention
from arl2_jax.nn.rope import rotate
from arl2_jax.sharding import BLOCKS, CLIPS, HEADS, lay_out, per_device
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
        return attention(q, seen.k, seen.v, position + q.shape[1])

    def attend_clip(self, p: Projections, blocks, copies):
        """One call a block, so that no score of an invisible key is ever computed."""
        by_block = PartitionSpec(CLIPS, None, BLOCKS, None, HEADS)
        by_head = PartitionSpec(CLIPS, None, None, None, (HEADS, BLOCKS))
        split = lambda x: lay_out(
            x.reshape(-1, copies, blocks, x.shape[1] // blocks, *x.shape[2:]), by_block
        )
        q, k, v = map(split, (rotate(p.q, p.rope), rotate(p.k, p.rope), p.v))
        # Every block sees all before it. So the devices that had shared out the blocks share out
        # the heads: q, k, v and then the output move between them (all-to-all).
        out = per_device(_attend_blocks, (by_head,) * 3, by_head)(q, k, v)
        return lay_out(out, by_block).reshape(p.q.shape), {}


def _attend_blocks(q: Array, k: Array, v: Array) -> Array:
    """Attention of every block to the clean ones before it and to itself.

    Each [B, copies, blocks, n, H, D].
    """
    seen = zip(_visible(k), _visible(v), strict=True)
    outputs = []
    for i, (keys, values) in enumerate(seen):
        queries = q[:, :, i].reshape(-1, *q.shape[3:])
        outputs.append(dot_product_attention(queries, keys, values))
    return jnp.stack(outputs, axis=1).reshape(q.shape)


@jax.custom_vjp
def _visible(x: Array) -> tuple[Array, ...]:
    """What each copy of every block sees.

    [B, copies, blocks, n, ...] -> one [B * copies, (i + 1) n, ...] for each block i
    """
    return tuple(_visible_from(x, i) for i in range(x.shape[2]))


def _visible_from(x: Array, i: int) -> Array:
    batch, copies = x.shape[:2]
    past = jnp.broadcast_to(x[:, :1, :i], (batch, copies, i, *x.shape[3:]))
    seen = jnp.concatenate([past, x[:, :, i : i + 1]], axis=2)
    return seen.reshape(batch * copies, -1, *x.shape[4:])


def _visible_forward(x: Array) -> tuple[tuple[Array, ...], int]:
    return _visible(x), x.shape[1]


def _visible_backward(copies: int, gradients: tuple[Array, ...]) -> tuple[Array]:
    """Sums block by block: the derivative of slices would fill each up to a whole clip first."""
    by_block = [
        g.reshape(-1, copies, i + 1, g.shape[1] // (i + 1), *g.shape[2:])
        for i, g in enumerate(gradients)
    ]
    summed = []
    for j, own in enumerate(by_block):
        later = sum(g[:, :, j] for g in by_block[j + 1 :])
        own = own[:, :, j]
        if j + 1 < len(by_block):
            clean = own[:, :1] + jnp.sum(later, axis=1, keepdims=True)
            own = jnp.concatenate([clean, own[:, 1:]], axis=1)
        summed.append(own)
    return (jnp.stack(summed, axis=2),)


_visible.defvjp(_visible_forward, _visible_backward)
