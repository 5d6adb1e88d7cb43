"""Low-rank updates of frozen linear layers."""

import jax.numpy as jnp
from flax import nnx

from arl2_jax.nn.linear import thin_matmul


class LowRank(nnx.Module):
    """x A B * alpha / rank; A is Kaiming-uniform and B zero, so it starts as no update.

    A is uniform in +-1 / sqrt(fan): Kaiming with the slope sqrt(5) of PyTorch's linear layers. The
    fan is in_dim for init="fan_in". ARL2's code stores A as [in, rank], so that PyTorch uses the
    rank as the fan: init="published".

    Source: LoRA, arXiv 2106.09685.
    """

    def __init__(
        self, in_dim: int, out_dim: int, rank: int, alpha: float, dtype, *, init: str, rngs
    ):
        fan = "fan_in" if init == "fan_in" else "fan_out"  # of [in_dim, rank]
        kaiming = nnx.initializers.variance_scaling(1 / 3, fan, "uniform")
        self.a = nnx.Param(kaiming(rngs.params(), (in_dim, rank)))
        self.b = nnx.Param(jnp.zeros((rank, out_dim)))
        self.scale = alpha / rank
        self.dtype = dtype

    def __call__(self, x):
        """Return the update alone, to be added to the layer's output."""
        a, b = self.a[...].astype(self.dtype), self.b[...].astype(self.dtype)
        return thin_matmul(thin_matmul(x.astype(self.dtype), a), b) * self.scale


def add_update(y, update: LowRank | None, x):
    """Return a linear layer's output y plus the update at its input x, if there is one."""
    return y if update is None else y + update(x)
