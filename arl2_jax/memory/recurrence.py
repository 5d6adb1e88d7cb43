"""States of the gated delta memory under its update rule and the rule's ablations."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from arl2_jax.config import GatedDeltaConfig
from arl2_jax.sharding import BLOCKS, CLIPS, HEADS, per_device
from pallas_kernels import gated_delta_states
from pallas_kernels.gated_delta import context_parallel

# Tokens by block, [B, blocks, n, H, ...]: each block is whole on one device.
BY_BLOCK = PartitionSpec(CLIPS, BLOCKS, None, HEADS)
_STATE = PartitionSpec(CLIPS, HEADS)
_STATES = PartitionSpec(CLIPS, BLOCKS, HEADS)


class Writes(NamedTuple):
    """The tokens' writes to the state; split into blocks, all have a block axis after B.

    Attributes:
      k: keys of unit length, [B, n, H, K].
      v: values, [B, n, H, V].
      g: log decay, at most 0, [B, n, H] float32.
      beta: strength, in (0, 2), [B, n, H] float32.
    """

    k: Float[Array, "b *blocks n h k"]
    v: Float[Array, "b *blocks n h v"]
    g: Float[Array, "b *blocks n h"]
    beta: Float[Array, "b *blocks n h"]


def states_before(
    cfg: GatedDeltaConfig, writes: Writes, state: Float[Array, "b h k v"], blocks: int
) -> Float[Array, "b blocks h k v"]:
    """Compute the state before each block, float32.

    Token by token, S <- exp(g) S; S <- S + beta k (v - S^T k)^T (arXiv 2412.06464), or one of the
    ablations that `cfg` names.

    Args:
      cfg: rule and span.
      writes: of all tokens of a run of blocks.
      state: before the first block.
      blocks: number of blocks.
    """
    return _states(cfg, writes, state, blocks, np.s_[:-1])


def state_after(
    cfg: GatedDeltaConfig, writes: Writes, state: Float[Array, "b h k v"]
) -> Float[Array, "b h k v"]:
    """Compute the state after one block; arguments as in `states_before`."""
    return _states(cfg, writes, state, 1, np.s_[1:])[:, 0]


def _states(cfg: GatedDeltaConfig, writes: Writes, state: Array, blocks: int, kept: slice):
    """Return the states `kept` of those before each block and after the last."""
    split = Writes(*(x.reshape(len(x), blocks, -1, *x.shape[2:]) for x in writes))
    if cfg.rule == "delta" and cfg.span == "video":
        return _delta(split, state, kept)
    if cfg.span == "video":
        after = _additive(split, state)
    else:
        after = _after_each_block(cfg, split)
    return jnp.concatenate([state[:, None], after], axis=1)[:, kept]


def _delta(writes: Writes, state: Array, kept: slice) -> Array:
    """Apply the published rule by the fastest kernel; a device may have only some of the blocks."""
    blocks = writes.k.shape[1]

    def run(k, v, g, beta, state):
        own, size = k.shape[1:3]
        k, v, g, beta = (x.reshape(len(x), -1, *x.shape[3:]) for x in (k, v, g, beta))
        if own == blocks:
            return gated_delta_states(k, v, g, beta, state, block_size=size)[:, kept]
        # Devices exchange only two matrices per head.
        return context_parallel.gated_delta_states(
            k, v, g, beta, state, axis_name=BLOCKS, block_size=size
        )[:, kept]

    return per_device(run, (*(BY_BLOCK,) * 4, _STATE), _STATES)(*writes, state)


def running_reads(
    cfg: GatedDeltaConfig,
    q: Float[Array, "b n h k"],
    writes: Writes,
    state: Float[Array, "b h k v"],
) -> Float[Array, "b n h v"]:
    """Read the state after each token of a block, the token's own write included, float32.

    Args:
      cfg: the rule.
      q: queries of unit length.
      writes: of the same tokens.
      state: before the block.
    """
    tokens = q.shape[1]
    chunk = max(d for d in range(1, math.isqrt(tokens) + 1) if tokens % d == 0)
    in_chunks = lambda x: jnp.moveaxis(x, 1, 0).reshape(-1, chunk, len(x), *x.shape[2:])

    def token(state, inputs):
        q, k, v, g, beta = (x.astype(jnp.float32) for x in inputs)
        state = jnp.exp(g)[..., None, None] * state
        old = jnp.einsum("bhkv,bhk->bhv", state, k) if cfg.rule == "delta" else 0.0
        state = state + jnp.einsum("bhk,bhv->bhkv", beta[..., None] * k, v - old)
        return state, jnp.einsum("bhkv,bhk->bhv", state, q)

    # The backward pass keeps one state per chunk and recomputes the others.
    run = jax.checkpoint(lambda state, inputs: jax.lax.scan(token, state, inputs))
    _, reads = jax.lax.scan(run, state, tuple(map(in_chunks, (q, *writes))))
    return jnp.moveaxis(reads.reshape(tokens, *reads.shape[2:]), 0, 1)


def _after_each_block(cfg: GatedDeltaConfig, writes: Writes) -> Array:
    """Return the state after each block from an empty state before it, [B, blocks, H, K, V]."""

    def run(k, v, g, beta):
        batch, blocks = k.shape[:2]
        one = Writes(*(x.reshape(batch * blocks, 1, *x.shape[2:]) for x in (k, v, g, beta)))
        empty = jnp.zeros((batch * blocks, k.shape[3], k.shape[4], v.shape[4]), jnp.float32)
        if cfg.rule == "additive":
            after = _additive(one, empty)
        else:
            k, v, g, beta = (x[:, 0] for x in one)
            after = gated_delta_states(k, v, g, beta, empty, block_size=k.shape[1])
        return after[:, -1].reshape(batch, blocks, *empty.shape[1:])

    return per_device(run, (BY_BLOCK,) * 4, _STATES)(*writes)


def _additive(writes: Writes, state: Array) -> Array:
    """Return states of gated linear attention, S <- exp(g) S + beta k v^T, after each block."""
    k, v, g, beta = (x.astype(jnp.float32) for x in writes)
    log_decay = jnp.cumsum(g, axis=2)
    total = log_decay[:, :, -1:]
    weights = beta * jnp.exp(total - log_decay)
    added = jnp.einsum("bmnhk,bmnhv->bmhkv", weights[..., None] * k, v)

    def block(state, inputs):
        decay, added = inputs
        state = decay[..., None, None] * state + added
        return state, state

    by_block = (jnp.moveaxis(x, 1, 0) for x in (jnp.exp(total[:, :, 0]), added))
    _, after = jax.lax.scan(block, state, tuple(by_block))
    return jnp.moveaxis(after, 0, 1)
