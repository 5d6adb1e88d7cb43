"""Softmax attention of a whole clip: every block sees the clean blocks before it and itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import dot_product_attention, merge_attention

_PRODUCT = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}

Blocks = Float[Array, "b copies blocks n h d"]


def attend_blocks(q: Blocks, k: Blocks, v: Blocks) -> Blocks:
    """Attend from every block to the clean ones before it and to itself.

    No score of an invisible key is ever computed.

    Args:
      q, k, v: [B, copies, blocks, n, H, D]; the first copy is the clean one.

    Returns:
      [B, copies, blocks, n, H, D] in the dtype of q.
    """
    forms = {"cpu": attend_batched, "gpu": attend_merged}
    return forms.get(jax.default_backend(), attend_block_by_block)(q, k, v)


@jax.custom_vjp
def attend_merged(q: Blocks, k: Blocks, v: Blocks) -> Blocks:
    """Compute `attend_blocks` by a kernel that reads the past in place; for GPUs.

    For each block, one call attends from all copies to the past. One more call attends from all
    blocks to themselves. The results are merged by their log-sum-exp. Where it is differentiated,
    it is `attend_block_by_block`: kernels with a backward pass take all visible keys in one array.
    """
    batch, copies, blocks, n, *heads = q.shape
    fold = lambda x: x.reshape(-1, n, *heads)
    own, own_lse = dot_product_attention(fold(q), fold(k), fold(v), return_lse=True)
    own, own_lse = own.reshape(q.shape), own_lse.reshape(q.shape[:-1])
    past = [x[:, 0].reshape(batch, blocks * n, *heads) for x in (k, v)]
    outputs = [own[:, :, 0]]
    for i in range(1, blocks):
        of_block = lambda x, i=i: x[:, :, i].reshape(batch, copies * n, *x.shape[4:])
        seen = dot_product_attention(of_block(q), *past, key_length=i * n, return_lse=True)
        merged, _ = merge_attention([seen, (of_block(own), of_block(own_lse))])
        outputs.append(merged.reshape(batch, copies, n, *heads))
    return jnp.stack(outputs, axis=2)


def _merged_forward(q: Blocks, k: Blocks, v: Blocks):
    return jax.vjp(attend_block_by_block, q, k, v)


def _merged_backward(vjp, gradient: Blocks) -> tuple[Blocks, Blocks, Blocks]:
    return vjp(gradient)


attend_merged.defvjp(_merged_forward, _merged_backward)


def attend_block_by_block(q: Blocks, k: Blocks, v: Blocks) -> Blocks:
    """Compute `attend_blocks` by one kernel call per block."""
    outputs = []
    for i, (past_k, past_v) in enumerate(zip(_before(k[:, 0]), _before(v[:, 0]), strict=True)):
        seen = (append_own(past, own[:, :, i]) for past, own in ((past_k, k), (past_v, v)))
        queries = q[:, :, i].reshape(-1, *q.shape[3:])
        outputs.append(dot_product_attention(queries, *seen))
    return jnp.stack(outputs, axis=1).reshape(q.shape)


def attend_batched(q: Blocks, k: Blocks, v: Blocks) -> Blocks:
    """Compute `attend_blocks` by fewer and larger products; for CPUs.

    On a CPU, copies and the number of products cost time. Heads are moved first once, all copies
    read the past in one product, and the attention of all blocks to themselves is one product.
    """
    batch, copies, blocks, n, heads, width = q.shape
    first = lambda x: x.astype(jnp.float32).transpose(0, 4, 1, 2, 3, 5)
    by_head = lambda x: first(x).reshape(batch * heads, copies, blocks, n, width)
    q_heads, k_heads, v_heads = map(by_head, (q, k, v))
    q_heads = q_heads * width**-0.5
    rows = lambda x: x.reshape(batch * heads, copies * n, x.shape[-1])
    scores = jnp.einsum("gsmqd,gsmkd->gsmqk", q_heads, k_heads, **_PRODUCT)
    own_weights, sums, reads = [], [], []
    pasts = zip(_before(k_heads[:, 0]), _before(v_heads[:, 0]), strict=True)
    for i, (past_k, past_v) in enumerate(pasts):
        own = rows(scores[:, :, i])
        past = jnp.einsum("gqd,gkd->gqk", rows(q_heads[:, :, i]), past_k, **_PRODUCT)
        # Softmax over both, from the largest score of each row.
        most = jnp.max(own, axis=-1, keepdims=True)
        if i:
            most = jnp.maximum(most, jnp.max(past, axis=-1, keepdims=True))
        most = jax.lax.stop_gradient(most)
        own, past = jnp.exp(own - most), jnp.exp(past - most)
        own_weights.append(own)
        sums.append(jnp.sum(own, axis=-1, keepdims=True) + jnp.sum(past, axis=-1, keepdims=True))
        reads.append(jnp.einsum("gqk,gkd->gqd", past, past_v, **_PRODUCT))
    stack = lambda x: jnp.stack(
        [y.reshape(batch * heads, copies, n, y.shape[-1]) for y in x], axis=2
    )
    out = jnp.einsum("gsmqk,gsmkd->gsmqd", stack(own_weights), v_heads, **_PRODUCT)
    out = (out + stack(reads)) / stack(sums)
    out = out.reshape(batch, heads, copies, blocks, n, width)
    return out.transpose(0, 2, 3, 4, 1, 5).astype(q.dtype)


def append_own(past: Float[Array, "b past h d"], own: Float[Array, "b copies n h d"]) -> Array:
    """Append each copy's own tokens to the shared past: [B * copies, past + n, H, D]."""
    shared = jnp.broadcast_to(past[:, None], (*own.shape[:2], *past.shape[1:]))
    seen = jnp.concatenate([shared, own], axis=2)
    return seen.reshape(-1, *seen.shape[2:])


@jax.custom_vjp
def _before(x: Float[Array, "b blocks n ..."]) -> tuple[Array, ...]:
    """Return the tokens before each block: for block i, [g, i n, ...]."""
    return tuple(x[:, :i].reshape(len(x), -1, *x.shape[3:]) for i in range(x.shape[1]))


def _before_forward(x: Array) -> tuple[tuple[Array, ...], Array]:
    return _before(x), jnp.zeros_like(x[:, -1])


def _before_backward(last: Array, gradients: tuple[Array, ...]) -> tuple[Array]:
    """Sum gradients block by block; JAX would first pad every gradient to a whole clip."""
    size = last.shape[1]
    of_block = lambda g, i: g[:, i * size : (i + 1) * size]
    summed = []
    for i in range(len(gradients) - 1):
        later = [of_block(g, i) for g in gradients[i + 1 :]]
        summed.append(sum(later[1:], later[0]))
    return (jnp.stack([*summed, last], axis=1),)


_before.defvjp(_before_forward, _before_backward)
