"""Products of tokens with a matrix, in the form that the device at hand differentiates best."""

from typing import Any

import jax
from jaxtyping import Array, Float

from arl2_jax.sharding import mesh_in_use


def dot_general(
    x: Float[Array, "*batch i"], kernel: Float[Array, "i o"], dimensions: Any, **options: Any
) -> Float[Array, "*batch o"]:
    """`jax.lax.dot_general` of tokens and a matrix, as `nnx.Linear` calls it.

    On a CPU the axes of x before the last become one: the derivative by the matrix sums over them,
    and for a sum over several axes XLA for CPUs writes a transposed copy of an operand. Where
    devices share out these axes they stay as they are.
    """
    if jax.default_backend() != "cpu" or mesh_in_use() is not None or x.ndim < 3:
        return jax.lax.dot_general(x, kernel, dimensions, **options)
    flat = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def matmul(x: Float[Array, "*batch i"], kernel: Float[Array, "i o"]) -> Float[Array, "*batch o"]:
    """x @ kernel by `dot_general`."""
    return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
