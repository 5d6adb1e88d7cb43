"""One layer of stacked keys and values."""

from jax import Array, lax


def of_layer(k: Array, v: Array, layer: Array | None) -> tuple[Array, Array]:
    """Return this layer of stacks [L, B, Tk, H, D], or k and v themselves if layer is None."""
    if layer is None:
        return k, v
    return tuple(lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k, v))
