"""The gated delta rule token by token: slow, in any precision, differentiated by autodiff."""

import jax
import jax.numpy as jnp
from jax import Array, lax


def gated_delta_states(
    k: Array, v: Array, g: Array, beta: Array, initial_state: Array, *, block_size: int
) -> Array:
    """Return states before each block and after the last; arguments as in the public function."""
    dtype = initial_state.dtype
    batch, time = k.shape[:2]

    def by_block(x: Array) -> Array:
        blocks = x.astype(dtype).reshape(batch, time // block_size, block_size, *x.shape[2:])
        return jnp.moveaxis(blocks, 0, 2)

    def token(state: Array, inputs: tuple[Array, Array, Array, Array]):
        k, v, g, beta = inputs
        state = jnp.exp(g)[..., None, None] * state
        read = jnp.einsum("bhk,bhkv->bhv", k, state, precision=lax.Precision.HIGHEST)
        write = beta[..., None] * (v - read)
        return state + k[..., :, None] * write[..., None, :], None

    def block(state: Array, inputs: tuple[Array, Array, Array, Array]):
        state, _ = lax.scan(token, state, inputs)
        return state, state

    _, ends = lax.scan(block, initial_state, jax.tree.map(by_block, (k, v, g, beta)))
    return jnp.moveaxis(jnp.concatenate([initial_state[None], ends]), 0, 1)
