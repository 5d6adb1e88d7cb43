"""Norms, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx


def rms_norm(x, scale, eps: float):
    """Return x / rms(x) * scale over the last axis, computed in float32, in the dtype of x."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm with a scale; memories that normalise again share the scale."""

    def __init__(self, dim: int, eps: float, *, rngs: nnx.Rngs):
        del rngs
        self.scale, self.eps = nnx.Param(jnp.ones(dim)), eps

    def __call__(self, x):
        """Normalise the last axis."""
        return rms_norm(x, self.scale[...], self.eps)


def layer_norm(dim: int, eps: float, *, affine: bool, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Make a LayerNorm over the last axis with a float32 result."""
    return nnx.LayerNorm(
        dim,
        epsilon=eps,
        use_scale=affine,
        use_bias=affine,
        use_fast_variance=False,
        dtype=jnp.float32,
        rngs=rngs,
    )
