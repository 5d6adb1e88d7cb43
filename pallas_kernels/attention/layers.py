"""One layer of stacked keys and values."""

from jax import Array, lax


def of_layer(k: Array, v: Array, layer: Array | None) -> tuple[Array, Array]:
    """Take this layer of stacks [L, B, Tk, H, D], or k and v themselves where layer is None."""
    if layer is None:
        return k, v
    return tuple(lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k, v))
