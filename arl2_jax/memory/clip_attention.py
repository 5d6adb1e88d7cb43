"""Softmax attention of a whole clip: every block sees the clean blocks before it and itself."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels import dot_product_attention

# Neighbouring blocks that `attend_together` takes at once.
_TOGETHER = 2
_PRODUCT = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}

Blocks = Float[Array, "b copies blocks n h d"]


def attend_blocks(q: Blocks, k: Blocks, v: Blocks) -> Blocks:
    """Attention of every block to the clean ones before it and to itself.

    Args:
      q, k, v: [B, copies, blocks, n, H, D]; the first copy is the clean one.

    Returns:
      [B, copies, blocks, n, H, D] in the dtype of q.
    """
    on_cpu = jax.default_backend() == "cpu"
    return (attend_together if on_cpu and q.shape[1] == 2 else attend_in_turn)(q, k, v)


def attend_in_turn(q: Blocks, k: Blocks, v: Blocks) -> Blocks:
    """`attend_blocks` by one call of a kernel a block, so that no score is computed in vain."""
    seen = zip(_visible(k), _visible(v), strict=True)
    outputs = []
    for i, (keys, values) in enumerate(seen):
        queries = q[:, :, i].reshape(-1, *q.shape[3:])
        outputs.append(dot_product_attention(queries, keys, values))
    return jnp.stack(outputs, axis=1).reshape(q.shape)


def attend_together(q: Blocks, k: Blocks, v: Blocks) -> Blocks:
    """`attend_blocks` of a clean and a noisy copy by few large products.

    On a CPU it is copies and the number of products that cost time. Heads come first, once; both
    copies and neighbouring blocks read the clean keys in one product, with what a block must not
    see masked; what noisy blocks see of themselves is one product for all of them.
    """
    batch, copies, blocks, n, heads, width = q.shape
    rows = lambda x: x.reshape(batch, heads, -1, x.shape[-1])
    by_copy = lambda x: x.reshape(batch, heads, copies, -1, x.shape[-1])
    queries, keys, values = (x.astype(jnp.float32).transpose(0, 4, 1, 2, 3, 5) for x in (q, k, v))
    queries = queries * width**-0.5
    own_scores = jnp.einsum("bhmqd,bhmkd->bhmqk", queries[:, :, 1], keys[:, :, 1], **_PRODUCT)
    past_keys, past_values = rows(keys[:, :, 0]), rows(values[:, :, 0])
    reads, totals, own_weights = [], [], []
    for first in range(0, blocks, _TOGETHER):
        last = min(first + _TOGETHER, blocks)
        seen = slice(0, last * n)
        asking = rows(queries[:, :, :, first:last])
        scores = jnp.einsum("bhqd,bhkd->bhqk", asking, past_keys[:, :, seen], **_PRODUCT)
        scores = by_copy(jnp.where(_sees(first, last, n), scores, -jnp.inf))
        own = rows(own_scores[:, :, first:last])
        # Softmax over both, less the largest score of each row.
        most = _plus_noisy(jnp.max(scores, -1), jnp.max(own, -1), jnp.maximum)
        most = jax.lax.stop_gradient(most)[..., None]
        weights, own = jnp.exp(scores - most), jnp.exp(own - most[:, :, 1])
        totals.append(_plus_noisy(jnp.sum(weights, -1), jnp.sum(own, -1), jnp.add))
        read = jnp.einsum("bhqk,bhkd->bhqd", rows(weights), past_values[:, :, seen], **_PRODUCT)
        reads.append(by_copy(read))
        own_weights.append(own)
    own = jnp.concatenate(own_weights, axis=2).reshape(batch, heads, blocks, n, n)
    own = rows(jnp.einsum("bhmqk,bhmkd->bhmqd", own, values[:, :, 1], **_PRODUCT))
    out = _plus_noisy(jnp.concatenate(reads, axis=3), own, jnp.add)
    out = out / jnp.concatenate(totals, axis=3)[..., None]
    out = out.reshape(batch, heads, copies, blocks, n, width)
    return out.transpose(0, 2, 3, 4, 1, 5).astype(q.dtype)


def _sees(first: int, last: int, n: int) -> Bool[np.ndarray, "queries keys"]:
    """Which clean tokens the blocks from first to last see, clean copies before noisy ones."""
    asking, seen = np.arange(first, last).repeat(n)[:, None], np.arange(last).repeat(n)
    return np.concatenate([seen <= asking, seen < asking])


def _plus_noisy(x: Array, noisy: Array, add) -> Array:
    """Adds to the noisy one of two copies, axis 2 of x."""
    return jnp.stack([x[:, :, 0], add(x[:, :, 1], noisy)], axis=2)


@jax.custom_vjp
def _visible(x: Blocks) -> tuple[Array, ...]:
    """What each copy of every block sees: for block i [B * copies, (i + 1) n, H, D]."""
    batch, copies, blocks, n, *rest = x.shape
    seen = []
    for i in range(blocks):
        past = jnp.broadcast_to(x[:, :1, :i], (batch, copies, i, n, *rest))
        both = jnp.concatenate([past, x[:, :, i : i + 1]], axis=2)
        seen.append(both.reshape(batch * copies, (i + 1) * n, *rest))
    return tuple(seen)


def _visible_forward(x: Blocks) -> tuple[tuple[Array, ...], int]:
    return _visible(x), x.shape[1]


def _visible_backward(copies: int, gradients: tuple[Array, ...]) -> tuple[Array]:
    """Sums for one block after the other; JAX would fill up every gradient to a clip first."""
    split = lambda g, m: g.reshape(-1, copies, m, g.shape[1] // m, *g.shape[2:])
    by_block = [split(g, i + 1) for i, g in enumerate(gradients)]
    summed = []
    for i, g in enumerate(by_block):
        own = g[:, :, i]
        if later := [g[:, :, i] for g in by_block[i + 1 :]]:
            clean = own[:, :1] + jnp.sum(sum(later[1:], later[0]), axis=1, keepdims=True)
            own = jnp.concatenate([clean, own[:, 1:]], axis=1)
        summed.append(own)
    return (jnp.stack(summed, axis=2),)


_visible.defvjp(_visible_forward, _visible_backward)
