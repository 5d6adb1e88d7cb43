"""Linear layers over any number of axes give the products and derivatives of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax.nn.linear import dot_general, matmul


@pytest.mark.parametrize("shape", [(6,), (5, 6), (3, 5, 6), (2, 3, 5, 6)])
def test_products_and_derivatives_are_those_of_jax(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (6, 4))
    weights = jnp.cos(jnp.arange(np.prod(shape[:-1]) * 4).reshape(*shape[:-1], 4))
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    loss = lambda product: lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel)) * weights)
    expected = jax.value_and_grad(loss(jnp.matmul), argnums=(0, 1))(x, kernel)
    for product in (matmul, lambda x, kernel: dot_general(x, kernel, numbers)):
        found = jax.value_and_grad(loss(product), argnums=(0, 1))(x, kernel)
        # Float32 sums of at most 30 terms in another order.
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        jax.tree.map(close, found, expected)


def test_options_reach_the_product():
    x, kernel = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5), jnp.bfloat16)
    numbers = (((2,), (0,)), ((), ()))
    assert dot_general(x, kernel, numbers).dtype == jnp.bfloat16
    found = dot_general(x, kernel, numbers, preferred_element_type=jnp.float32)
    assert found.dtype == jnp.float32 and found.shape == (2, 3, 5)
