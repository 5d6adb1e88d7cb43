"""Inputs, calls and costs of the operations that benchmarks/kernel_times.py times.

Operations (FLOP) are those of the algorithm, not of an implementation: the gated delta rule in
chunks of 64 tokens, forward 4 C K + 4 K V + 2/3 C^2 a token and head, backward 12 C K + 14 K V, in
which the states before chunks are recomputed; attention 4 B H Tq Tk D forward, 10 backward. Bytes
are the least that any implementation moves: each argument read once, each result written once.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import flash_linear_attention as fla
import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import dot_product_attention, gated_delta_states
from pallas_kernels.attention import api as attention
from pallas_kernels.attention import shapes as attention_shapes
from pallas_kernels.gated_delta import api as gated_delta
from pallas_kernels.gated_delta import shapes as gated_delta_shapes

_CHUNK = 64


class Cost(NamedTuple):
    """FLOP and bytes."""

    flop: float
    size: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flop + other.flop, self.size + other.size)


class Operation(NamedTuple):
    """An operation; `shape` is an entry of `shapes`.

    Attributes:
        shapes: Named sizes.
        implementations: Those of the library, its own choice "default", and others'.
        results: Names of the result and of the gradients.
        make_inputs: (shape, dtype, key) -> differentiable arguments.
        call: (shape, implementation or None, precision) -> function of them.
        part: (shape, array) -> what of an argument, result or gradient is checked.
        cost: (shape, bytes of an element) -> costs of forward and backward.
    """

    shapes: dict[str, Any]
    implementations: tuple[str, ...]
    results: tuple[str, ...]
    make_inputs: Callable[[Any, str, Array], tuple[Array, ...]]
    call: Callable[[Any, Any, Any], Callable[..., Array]]
    part: Callable[[Any, Array], Array]
    cost: Callable[[Any, int], tuple[Cost, Cost]]


def _states_inputs(shape: gated_delta_shapes.Shape, dtype: str, key: Array) -> tuple[Array, ...]:
    """Unit keys that share a direction, as those of video do; weak decay, writing below 2."""
    keys = jax.random.split(key, 6)
    tokens = (shape.batch, shape.time, shape.heads)
    own = jax.random.normal(keys[0], (*tokens, shape.key_dim))
    common = jax.random.normal(keys[1], (shape.batch, 1, shape.heads, shape.key_dim))
    k = 0.1**0.5 * own + 0.9**0.5 * common
    k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    v = jax.random.normal(keys[2], (*tokens, shape.value_dim))
    g = -jnp.exp(jax.random.normal(keys[3], tokens) - 4)
    beta = jax.random.uniform(keys[4], tokens, maxval=1.999)
    size = (shape.batch, shape.heads, shape.key_dim, shape.value_dim)
    return k.astype(dtype), v.astype(dtype), g, beta, jax.random.normal(keys[5], size)


def _states_call(
    shape: gated_delta_shapes.Shape, implementation: Any, precision: Any
) -> Callable[..., Array]:
    return functools.partial(
        gated_delta_states,
        block_size=shape.block_size,
        implementation=implementation,
        precision=precision,
    )


def _states_cost(shape: gated_delta_shapes.Shape, element: int) -> tuple[Cost, Cost]:
    c, k, v = _CHUNK, shape.key_dim, shape.value_dim
    tokens = shape.batch * shape.time * shape.heads
    state = shape.batch * shape.heads * k * v * 4
    states = (shape.blocks + 1) * state
    inputs = tokens * ((k + v) * element + 2 * 4) + state
    forward = Cost(tokens * (4 * c * k + 4 * k * v + 2 / 3 * c**2), inputs + states)
    backward = Cost(tokens * (12 * c * k + 14 * k * v), 2 * inputs + states)
    return forward, backward


def _attention_inputs(shape: attention_shapes.Shape, dtype: str, key: Array) -> tuple[Array, ...]:
    lengths = (shape.queries, shape.keys, shape.keys)
    return tuple(
        jax.random.normal(k, (shape.batch, length, shape.heads, shape.head_dim), dtype)
        for k, length in zip(jax.random.split(key, 3), lengths, strict=True)
    )


def _attention_call(
    shape: attention_shapes.Shape, implementation: Any, precision: Any
) -> Callable[..., Array]:
    del precision
    return functools.partial(
        dot_product_attention, key_length=shape.filled, implementation=implementation
    )


def _attention_part(shape: attention_shapes.Shape, x: Array) -> Array:
    """The first row of a batch, and of keys the visible ones."""
    return x[:1, : shape.visible] if x.shape[1] == shape.keys else x[:1]


def _attention_cost(shape: attention_shapes.Shape, element: int) -> tuple[Cost, Cost]:
    token = shape.batch * shape.heads * shape.head_dim
    products = token * shape.queries * shape.visible
    queries, keys = (token * n * element for n in (shape.queries, shape.visible))
    # Backward reads q, k, v, the output and its cotangent, and writes three gradients.
    forward = Cost(4 * products, 2 * queries + 2 * keys)
    return forward, Cost(10 * products, 4 * queries + 4 * keys)


OPERATIONS: dict[str, Operation] = {
    "gated_delta_states": Operation(
        gated_delta_shapes.SHAPES,
        ("default", *get_args(gated_delta.Implementation), *fla.FUNCTIONS),
        ("states", "dk", "dv", "dg", "dbeta", "dinitial_state"),
        _states_inputs,
        _states_call,
        lambda shape, x: x,
        _states_cost,
    ),
    "dot_product_attention": Operation(
        attention_shapes.SHAPES,
        ("default", *get_args(attention.Implementation)),
        ("out", "dq", "dk", "dv"),
        _attention_inputs,
        _attention_call,
        _attention_part,
        _attention_cost,
    ),
}
