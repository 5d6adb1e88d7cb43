"""Attention to the union of several sets of keys, from the attentions to each."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax


def merge_attention(parts: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Merge attentions of the same queries to disjoint sets of keys into one to all of them.

    Args:
        parts: One (out, lse) for each set, as `dot_product_attention(..., return_lse=True)` returns
            it: out [B, Tq, H, D], floating point and finite; lse [B, Tq, H], -inf where the set
            has no visible key.

    Returns:
        (out, lse) of the attention to all keys. out is in the dtype of the first out, lse float32;
        both are computed in float32. Where no set has a visible key, out is zero and lse -inf.

    Raises:
        ValueError: There are no parts, or their shapes differ.
    """
    _check(parts)
    lses = [lse.astype(jnp.float32) for _, lse in parts]
    highest = jnp.stack(lses).max(axis=0)
    # The results do not depend on this reference, so it needs no gradient. It has to be finite:
    # -inf less -inf is NaN.
    reference = lax.stop_gradient(jnp.where(highest == -jnp.inf, 0, highest))
    weights = [jnp.exp(lse - reference) for lse in lses]
    total = sum(weights[1:], weights[0])
    # Avoids 0 / 0 and log 0 in rows without any key.
    some = jnp.where(total > 0, total, 1)
    scaled = [
        (weight / some)[..., None] * out.astype(jnp.float32)
        for weight, (out, _) in zip(weights, parts, strict=True)
    ]
    out = sum(scaled[1:], scaled[0])
    lse = jnp.where(total > 0, reference + jnp.log(some), -jnp.inf)
    return out.astype(parts[0][0].dtype), lse


def _check(parts: Sequence[tuple[Array, Array]]) -> None:
    if not parts:
        raise ValueError("parts is empty; must hold at least one (out, lse)")
    shape = parts[0][0].shape
    if len(shape) != 4:
        raise ValueError(f"out of part 0 has shape {shape}; must be [B, Tq, H, D]")
    for i, (out, lse) in enumerate(parts):
        if out.shape != shape:
            raise ValueError(
                f"out of part {i} has shape {out.shape}; must be that of part 0, {shape}"
            )
        if lse.shape != shape[:3]:
            raise ValueError(f"lse of part {i} has shape {lse.shape}; must be {shape[:3]}")
