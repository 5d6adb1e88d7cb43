"""The gated delta rule over tokens that are split over the devices of a mesh axis.

A run of tokens maps the state before it to the state after it, S' = A S + B. The maps from a
device's first token to its own boundaries are the states that the values [v | 0] make of [0 | I]:
[B | A]. Maps of whole devices are composed over the axis, which moves two matrices per head for
any number of tokens. The result is the state S that each device starts from; its states are
A S + B.

In the backward pass cotangents D of states travel the other way by the same exchange,
D = A^T D' + dB, to give each device the cotangent of its last state. The rest is an ordinary
backward pass.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.gated_delta import api, checks

_matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def gated_delta_states(
    k: Array,
    v: Array,
    g: Array,
    beta: Array,
    initial_state: Array | None = None,
    *,
    axis_name: str,
    block_size: int,
    implementation: checks.Implementation | None = None,
    precision: checks.Precision = "default",
    chunk_size: int | None = None,
) -> Array:
    """Return the states that one device's tokens read, inside `jax.shard_map` over `axis_name`.

    Device i of n has the tokens [i T / n, (i + 1) T / n). Blocks may span devices and devices may
    span blocks. Where n does not divide T, every block is padded at its end with tokens that have
    beta = 0 and g = 0, the identity.

    Args:
        k, v, g, beta: As in `pallas_kernels.gated_delta_states`, with this device's T / n tokens.
        initial_state: State before the very first token, equal on all devices; None means zeros.
        axis_name: Mesh axis that the tokens are split over.
        block_size: Tokens of a block; divides T.
        implementation, precision, chunk_size: As in `pallas_kernels.gated_delta_states`, which is
            called with values K + V wide.

    Returns:
        States [B, m + 1, H, K, V]: before each block that this device's tokens are in, and after
        its last token. m is the largest number of blocks that the tokens of one device are in;
        a device with fewer repeats its last state. On the last device that is the final state.
        If block_size divides T / n, these are the states at the boundaries of T / n / block_size
        blocks.

    Raises:
        ValueError: A shape, dtype or option is not as described.
        NotImplementedError: The named implementation cannot do this here.
    """
    k, v, g, beta = (jnp.asarray(x) for x in (k, v, g, beta))
    checks.check_options(implementation, precision, chunk_size)
    checks.check_tokens(k, v, g, beta, block_size=1)
    devices, tokens = lax.axis_size(axis_name), k.shape[1]
    if block_size < 1 or devices * tokens % block_size:
        raise ValueError(
            f"block_size is {block_size}; must divide the {devices * tokens} tokens of k on the "
            f"{devices} devices along {axis_name!r}; pad blocks with beta = 0, g = 0"
        )
    zeros = _zeros(k, v.shape[-1])
    if initial_state is None:
        initial_state = zeros
    initial_state = jnp.asarray(initial_state)
    checks.check_state(k, v, initial_state)
    initial_state += zeros  # makes a replicated value vary over the mesh

    plain = partial(
        api.gated_delta_states,
        implementation=implementation,
        precision=precision,
        chunk_size=chunk_size,
    )
    if devices == 1:
        return plain(k, v, g, beta, initial_state, block_size=block_size)
    # Boundaries of pieces are at the same places on all devices, and include those of blocks.
    piece = math.gcd(tokens, block_size)
    plain = partial(plain, block_size=piece)
    states: Any = _piece_states(plain, axis_name, k, v, g, beta, initial_state)
    return _block_states(states, initial_state, axis_name, block_size // piece)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _piece_states(plain: Callable[..., Array], axis_name: str, *inputs: Array) -> Array:
    """Return states at the boundaries of a device's pieces; `plain` computes them on one device."""
    return _forward(plain, axis_name, *inputs)[0]


def _forward(plain: Callable[..., Array], axis_name: str, *inputs: Array) -> tuple[Array, Any]:
    k, v, g, beta, initial_state = inputs
    width, empty = v.shape[-1], jnp.zeros_like(initial_state)
    identity = _zeros(k, k.shape[-1]) + jnp.eye(k.shape[-1], dtype=empty.dtype)
    values = jnp.concatenate([v, jnp.zeros_like(k)], -1)
    maps = plain(k, values, g, beta, jnp.concatenate([empty, identity], -1))
    a, b = maps[..., width:], maps[..., :width]
    start = _compose_before(a[:, -1], b[:, -1], initial_state, axis_name, 1)
    return _matmul(a, start[:, None]) + b, (k, v, g, beta, start, a)


def _backward(plain: Callable[..., Array], axis_name: str, residuals: Any, dstates: Array):
    *inputs, a = residuals
    a = a.mT
    dstart = _matmul(a, dstates).sum(1)
    end = _compose_before(a[:, -1], dstart, jnp.zeros_like(dstart), axis_name, -1)
    _, vjp = jax.vjp(plain, *inputs)
    *dinputs, dstart = vjp(dstates.at[:, -1].add(end))
    return (*dinputs, jnp.where(lax.axis_index(axis_name) == 0, dstart, 0))


_piece_states.defvjp(_forward, _backward)


def _compose_before(a: Array, b: Array, first: Array, axis_name: str, step: int) -> Array:
    """Apply the maps (a, b) of all devices before this one to `first`.

    step = 1 goes from the first device to the last, -1 from the last to the first. Every round
    doubles the number of devices that a map covers. The first device's map is a constant, A = 0,
    which ends all products. Where no device sends, ppermute gives zeros, so no mask is needed.
    """
    devices = lax.axis_size(axis_name)
    is_first = lax.axis_index(axis_name) == (0 if step == 1 else devices - 1)

    def receive(x: Any, distance: int) -> Any:
        pairs = [(i, i + step * distance) for i in range(devices)]
        return lax.ppermute(x, axis_name, [pair for pair in pairs if 0 <= pair[1] < devices])

    a, b = jnp.where(is_first, 0, a), jnp.where(is_first, _matmul(a, first) + b, b)
    a, b = receive((a, b), 1)
    for i in range((devices - 2).bit_length()):
        earlier_a, earlier_b = receive((a, b), 2**i)
        a, b = _matmul(a, earlier_a), _matmul(a, earlier_b) + b
    return jnp.where(is_first, first, b)


def _block_states(states: Array, initial_state: Array, axis_name: str, pieces: int) -> Array:
    """Select states before blocks of `pieces` pieces, and the one after the last piece."""
    devices, own = lax.axis_size(axis_name), states.shape[1] - 1
    if own % pieces == 0:
        return states[:, ::pieces]
    block = lambda piece: piece // pieces  # of a piece, counted over all devices
    blocks = max(block(i * own + own - 1) - block(i * own) + 1 for i in range(devices))

    # A block that began on an earlier device: that device sends its last boundary.
    distances: dict[int, list[tuple[int, int]]] = {}
    for i in range(devices):
        sender = block(i * own) * pieces // own
        if block(i * own) > 0 and sender < i and i * own % pieces:
            distances.setdefault(i - sender, []).append((sender, i))
    first_piece = lax.axis_index(axis_name) * own
    begun = block(first_piece + own - 1) * pieces - first_piece
    boundary = jnp.take(states, jnp.maximum(begun, 0), axis=1)
    received = jnp.zeros_like(boundary)
    for pairs in distances.values():  # a device is in one pair at most; others receive zeros
        received += lax.ppermute(boundary, axis_name, pairs)
    received = jnp.where(block(first_piece) == 0, initial_state, received)

    places = (block(first_piece) + jnp.arange(blocks)) * pieces - first_piece
    before = jnp.take(states, jnp.clip(places, 0, own), axis=1)
    head = jnp.where(places[0] < 0, received, before[:, 0])
    return jnp.concatenate([head[:, None], before[:, 1:], states[:, -1:]], axis=1)


def _zeros(k: Array, width: int) -> Array:
    """Return zeros [B, H, K, width] in the state's dtype, which vary over the mesh as k does."""
    column = jnp.zeros_like(k[:, 0, :, :, None], checks.state_dtype(k))
    return jnp.broadcast_to(column, (*column.shape[:-1], width))
