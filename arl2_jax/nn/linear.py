"""Products of tokens with a matrix, in the form whose gradient is fastest on the current device."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arl2_jax.sharding import BLOCKS, current_mesh

# Most tokens in one part of a sum over tokens.
_PART = 8192


def dot_general(
    x: Float[Array, "*batch i"], kernel: Float[Array, "i o"], dimensions: Any, **options: Any
) -> Float[Array, "*batch o"]:
    """Multiply tokens by a matrix; called by `nnx.Linear` in place of `jax.lax.dot_general`.

    On a CPU the leading axes of x are flattened: the gradient of the matrix sums over them, and for
    a sum over several axes XLA for CPUs writes a transposed copy of an operand. Under a mesh the
    axes stay as they are.
    """
    if jax.default_backend() != "cpu" or current_mesh() is not None or x.ndim < 3:
        return jax.lax.dot_general(x, kernel, dimensions, **options)
    flat = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(flat, kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def thin_dot_general(
    x: Float[Array, "*batch i"], kernel: Float[Array, "i o"], dimensions: Any, **options: Any
) -> Float[Array, "*batch o"]:
    """Multiply as `dot_general` by a trained kernel of few rows or columns.

    The kernel's gradient is a small matrix that sums over all tokens, which occupies a GPU only if
    the sum is split. XLA splits it too, but pads a copy of both operands; here parts are slices.
    """
    plain = x.ndim == 3 and all(option is None for option in options.values())
    if jax.default_backend() == "cpu" or not plain:
        return dot_general(x, kernel, dimensions, **options)
    return matmul_by_parts(x, kernel)


def thin_matmul(
    x: Float[Array, "*batch i"], kernel: Float[Array, "i o"]
) -> Float[Array, "*batch o"]:
    """Return x @ kernel by `thin_dot_general`."""
    return thin_dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def heads_matmul(
    x: Float[Array, "b n h d"], kernels: Float[Array, "h d e"]
) -> Float[Array, "b n h e"]:
    """Multiply each head by its own trained matrix, in the form of `thin_dot_general`."""
    if jax.default_backend() == "cpu":
        return jnp.einsum("bnhd,hde->bnhe", x, kernels)
    return heads_matmul_by_parts(x, kernels)


@jax.custom_vjp
def matmul_by_parts(x: Float[Array, "b n i"], kernel: Float[Array, "i o"]) -> Array:
    """Return x @ kernel; the gradient of the kernel is summed part by part, in float32."""
    return x @ kernel


@jax.custom_vjp
def heads_matmul_by_parts(x: Float[Array, "b n h d"], kernels: Float[Array, "h d e"]) -> Array:
    """Multiply as `heads_matmul`; kernel gradients are summed part by part, in float32."""
    return _each_head(x, kernels)


def _each_head(x: Float[Array, "b n h d"], kernels: Float[Array, "h d e"]) -> Array:
    # jnp.einsum would put the kernels first, so that tokens come last and must be transposed.
    by_head = jax.lax.dot_general(x, kernels, (((3,), (1,)), ((2,), (0,))))
    return jnp.moveaxis(by_head, 0, 2)


def _matmul_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    return gradient @ kernel.T, _sum_of_parts("bpni,bpno->bpio", x, gradient, kernel)


def _heads_matmul_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernels = saved
    back = _each_head(gradient, kernels.swapaxes(1, 2))
    return back, _sum_of_parts("bpnhd,bpnhe->bphde", x, gradient, kernels)


matmul_by_parts.defvjp(lambda x, w: (x @ w, (x, w)), _matmul_backward)
heads_matmul_by_parts.defvjp(
    lambda x, w: (heads_matmul_by_parts(x, w), (x, w)), _heads_matmul_backward
)


def _sum_of_parts(product: str, x: Array, gradient: Array, kernel: Array) -> Array:
    """Compute the gradient of a kernel as a sum of products over parts of the tokens."""
    parts = jnp.einsum(product, _parts(x), _parts(gradient), preferred_element_type=jnp.float32)
    return jnp.sum(parts, axis=(0, 1)).astype(kernel.dtype)


def _parts(x: Float[Array, "b n ..."]) -> Array:
    """Split tokens into the fewest equal parts that are short enough and each on one device.

    Part lengths that are multiples of eight, as tensor cores take, are preferred.
    """
    mesh, tokens = current_mesh(), x.shape[1]
    devices = 1 if mesh is None else mesh.shape[BLOCKS]
    counts = [n for n in range(devices, tokens + 1, devices) if tokens % n == 0]
    short = [n for n in counts if tokens // n <= _PART]
    count = min(short, key=lambda n: (tokens // n % 8 > 0, n), default=1)
    return x.reshape(len(x), count, tokens // count, *x.shape[2:])
