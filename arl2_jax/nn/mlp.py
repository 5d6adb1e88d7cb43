"""The two-layer perceptron of the embeddings and of the feed-forward network."""

import jax
from flax import nnx

from arl2_jax.nn.linear import dot_general
from arl2_jax.nn.lora import add_update


class MLP(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(self, in_dim, hidden, out_dim, activation, dtype, *, rngs, kernel_init=None):
        init = kernel_init or nnx.initializers.xavier_uniform()
        make = lambda i, o: nnx.Linear(
            i, o, dtype=dtype, kernel_init=init, dot_general=dot_general, rngs=rngs
        )
        self.fc1, self.fc2 = make(in_dim, hidden), make(hidden, out_dim)
        self.activation = activation

    def __call__(self, x, lora1=None, lora2=None):
        """Apply the two layers, each with an optional low-rank update of its kernel."""
        h = self.activation(add_update(self.fc1(x), lora1, x))
        return add_update(self.fc2(h), lora2, h)


def gelu_tanh(x):
    """Apply GELU in its tanh approximation, as Wan does."""
    return jax.nn.gelu(x, approximate=True)
