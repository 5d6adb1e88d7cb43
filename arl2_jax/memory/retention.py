"""Measures of how much of the past a gated delta state keeps.

Over a block the update is affine in the state, S -> A S + B (ARL2, section 3): A [K, K] determines
what survives of any earlier state.
"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from arl2_jax.config import GatedDeltaConfig
from arl2_jax.memory.interface import Projections
from arl2_jax.memory.recurrence import Writes, state_after, states_before
from arl2_jax.nn.attention import attention
from arl2_jax.nn.positions import TokenGrid
from arl2_jax.nn.rope import rotate
from arl2_jax.sharding import CLIPS, HEADS, per_device

if TYPE_CHECKING:
    from arl2_jax.memory.gated_delta import GatedDelta

# Numbers of blocks over which survival is measured.
LAGS = (1, 2, 4, 8)

Measures = dict[str, Array]

_PUBLISHED = GatedDeltaConfig()


def transitions(
    writes: Writes, blocks: int, settings: GatedDeltaConfig = _PUBLISHED
) -> Float[Array, "b blocks h k k"]:
    """Compute each block's transition matrix A, in S -> A S + B.

    Args:
      writes: tokens of whole clips, [B, n, H, ...].
      blocks: blocks of a clip; divides n.
      settings: rule and span of the memory.

    Returns:
      [B, blocks, H, K, K] in the dtype of the state.
    """
    batch, time, heads, width = writes.k.shape
    split = lambda x: x.reshape(batch * blocks, time // blocks, *x.shape[2:])
    each = Writes(*map(split, writes))
    eye = jnp.eye(width, dtype=each.g.dtype)
    eye = jnp.broadcast_to(eye, (len(each.k), heads, width, width))
    # With zero values the block maps the identity to A.
    after = state_after(settings, each._replace(v=jnp.zeros_like(each.k)), eye)
    return after.reshape(batch, blocks, heads, width, width)


def share_kept(transition: Float[Array, "*batch k k"]) -> Float[Array, "*batch"]:
    """Return the root-mean-square share of a random state that survives: ||A||_F / sqrt(K)."""
    # Divided by the largest entry first: squares of entries below 1e-19 are zero in float32.
    size = jnp.max(jnp.abs(transition), axis=(-2, -1), keepdims=True)
    scaled = transition / jnp.where(size > 0, size, 1)
    mean = jnp.sum(jnp.square(scaled), axis=(-2, -1)) / transition.shape[-1]
    return size[..., 0, 0] * jnp.sqrt(mean)


def survival(transition: Float[Array, "b blocks h k k"], lag: int) -> Float[Array, "b h"]:
    """Return the share kept over `lag` consecutive blocks, ||A_b ... A_(b-lag+1)||_F / sqrt(K).

    It is the mean over all such runs of a clip. With lag = 1 it is the retention of a block.

    Raises:
      ValueError: the clip has fewer blocks.
    """
    count = transition.shape[1] - lag + 1
    if lag < 1 or count < 1:
        raise ValueError(f"lag={lag} must be within 1..{transition.shape[1]}, the blocks of a clip")
    product = transition[:, :count]
    for i in range(1, lag):
        later = transition[:, i : i + count]
        product = jnp.einsum("bmhij,bmhjk->bmhik", later, product, precision="highest")
    return jnp.mean(share_kept(product), axis=1)


def weights_at_end(
    writes: Writes, blocks: int, settings: GatedDeltaConfig = _PUBLISHED
) -> Float[Array, "b blocks _ h"]:
    """Return the weight of each token in the state at the end of its clip.

    That state is linear in the values, S = sum_t c_t v_t^T with c_t = beta_t A_(t+1..end) k_t,
    and the weight of a token is |c_t|.

    Returns:
      [B, blocks, tokens of a block, H] in the dtype of the state.
    """
    k, _, g, beta = writes
    batch, time, heads, width = k.shape

    def last_state(v):
        last = lambda x: x[:, time - time // blocks :]
        empty = jnp.zeros((batch, heads, width, width), g.dtype)
        before = states_before(settings, Writes(k, v, g, beta), empty, blocks)[:, -1]
        return state_after(settings, Writes(*map(last, (k, v, g, beta))), before)

    # Against the identity, the derivative by v_t of the sum above is c_t, for all tokens at once.
    eye = jnp.broadcast_to(jnp.eye(width, dtype=g.dtype), (batch, heads, width, width))
    [c] = jax.vjp(last_state, jnp.zeros_like(k))[1](eye)
    c = c.astype(g.dtype)
    size = jnp.max(jnp.abs(c), axis=-1, keepdims=True)
    norm = jnp.linalg.norm(c / jnp.where(size > 0, size, 1), axis=-1) * size[..., 0]
    return norm.reshape(batch, blocks, time // blocks, heads)


def participation(weights: Array, axis: int | tuple[int, ...]) -> Array:
    """Return the participation ratio, (sum w)^2 / sum w^2: N for N equal weights and zeros.

    Zero where all weights are zero.
    """
    size = jnp.max(weights, axis=axis, keepdims=True)
    scaled = weights / jnp.where(size > 0, size, 1)
    squares = jnp.sum(jnp.square(scaled), axis=axis)
    return jnp.square(jnp.sum(scaled, axis=axis)) / jnp.where(squares > 0, squares, 1)


def measure_writes(
    writes: Writes, blocks: int, settings: GatedDeltaConfig = _PUBLISHED
) -> Measures:
    """Measure how much of the past the tokens of clips leave.

    Args:
      writes: tokens of whole clips, [B, n, H, ...].
      blocks: blocks of a clip; divides n.
      settings: rule and span of the memory.

    Returns:
      Per clip and head, [B, H] each, means over the blocks of a clip:
        retention: root-mean-square share of a random state that survives a block.
        best_kept, least_kept: share of the direction that survives a block best, and worst.
        decay: share that the decay alone leaves after a block, exp(sum g).
        beta: mean strength of the writes.
        load: how often the writes of a block replace the whole state, n beta / K.
        tokens, blocks: participation ratios of tokens and blocks in the state at the clip's end.
        survival_1, survival_2, ...: share that survives that many blocks; only those of `LAGS` for
          which the clip is long enough.
    """
    batch, time, heads, width = writes.k.shape
    found = transitions(writes, blocks, settings)
    singular = jnp.linalg.svd(found, compute_uv=False)
    decay = jnp.exp(jnp.sum(writes.g.reshape(batch, blocks, -1, heads), axis=2))
    beta, weights = jnp.mean(writes.beta, axis=1), weights_at_end(writes, blocks, settings)
    measures = {
        "retention": jnp.mean(share_kept(found), axis=1),
        "best_kept": jnp.mean(singular[..., 0], axis=1),
        "least_kept": jnp.mean(singular[..., -1], axis=1),
        "decay": jnp.mean(decay, axis=1),
        "beta": beta,
        "load": time // blocks / width * beta,
        "tokens": participation(weights, (1, 2)),
        "blocks": participation(jnp.sum(weights, axis=2), 1),
    }
    lags = [lag for lag in LAGS if lag <= blocks]
    return measures | {f"survival_{lag}": survival(found, lag) for lag in lags}


def measure_memory(memory: "GatedDelta", p: Projections, grid: TokenGrid, blocks: int) -> Measures:
    """Measure a layer's memory on clips.

    Args:
      memory: the layer's memory.
      p: projections of clean clips, each its own past.
      grid: positions of a clip.
      blocks: blocks of a clip.

    Returns:
      The measures of `measure_writes`, and read_to_local [B, H]: root mean square of the tokens'
      gated reads of the memory, over that of the attention inside their block. The first block of a
      clip has nothing to read and is left out; 0 in a clip of one block.
    """
    # Sharded by heads, with all tokens: keys and values are small compared to the activations.
    tokens, per_clip = PartitionSpec(CLIPS, None, HEADS), PartitionSpec(CLIPS, HEADS)
    measure = lambda *writes: measure_writes(Writes(*writes), blocks, memory.settings)
    measures = per_device(measure, (tokens,) * 4, per_clip)(*memory.writes(p, grid, blocks))
    return measures | {"read_to_local": _read_to_local(memory, p, grid, blocks)}


def _read_to_local(
    memory: "GatedDelta", p: Projections, grid: TokenGrid, blocks: int
) -> Float[Array, "b h"]:
    batch, time, heads, width = p.v.shape
    if memory.gate != "learned" or blocks == 1:
        return jnp.zeros((batch, heads), jnp.float32)
    fold = lambda x: x.reshape(batch * blocks, time // blocks, heads, width)
    rope = grid.rotation()
    local = attention(*map(fold, (rotate(p.q, rope), rotate(p.k, rope), p.v)))
    read, gate = memory.read_clip(p, grid, blocks, copies=1)

    def rms(x):
        later = x.astype(jnp.float32).reshape(batch, blocks, -1, heads, width)[:, 1:]
        return jnp.sqrt(jnp.mean(jnp.square(later), axis=(1, 2, 4)))

    return rms(gate * read) / (rms(local) + 1e-12)
