"""Norms, computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx


def rms_norm(x, scale, eps: float):
    """x / rms(x) * scale over the last axis, in float32; returned in the dtype of x."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale).astype(x.dtype)


class RMSNorm(nnx.Module):
    """RMSNorm with a scale; the scale is shared with memories that normalise anew."""

    def __init__(self, dim: int, eps: float, *, rngs: nnx.Rngs):
        del rngs
        self.scale, self.eps = nnx.Param(jnp.ones(dim)), eps

    def __call__(self, x):
        """Normalises the last axis."""
        return rms_norm(x, self.scale[...], self.eps)


def layer_norm(dim: int, eps: float, *, affine: bool, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over the last axis; the result is float32."""
    return nnx.LayerNorm(
        dim,
        epsilon=eps,
        use_scale=affine,
        use_bias=affine,
        use_fast_variance=False,
        dtype=jnp.float32,
        rngs=rngs,
    )
