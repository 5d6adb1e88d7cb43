"""Linear layers over any number of axes give the products and derivatives of JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax import sharding
from arl2_jax.config import MeshConfig
from arl2_jax.nn import linear
from arl2_jax.nn.linear import (
    dot_general,
    heads_matmul,
    heads_matmul_by_parts,
    matmul_by_parts,
    thin_matmul,
)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (3, 5, 6), (2, 3, 5, 6)])
def test_products_and_derivatives_are_those_of_jax(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    kernel = jax.random.normal(jax.random.key(1), (6, 4))
    weights = jnp.cos(jnp.arange(np.prod(shape[:-1]) * 4).reshape(*shape[:-1], 4))
    numbers = (((x.ndim - 1,), (0,)), ((), ()))
    loss = lambda product: lambda x, kernel: jnp.sum(jnp.sin(product(x, kernel)) * weights)
    expected = jax.value_and_grad(loss(jnp.matmul), argnums=(0, 1))(x, kernel)
    for product in (thin_matmul, lambda x, kernel: dot_general(x, kernel, numbers)):
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


@pytest.mark.parametrize("tokens", [1, 7, 24, 30])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_sums_by_parts_are_those_of_jax(monkeypatch, tokens, dtype):
    """Also where no part is short enough, and where none has a multiple of eight tokens."""
    monkeypatch.setattr(linear, "_PART", 10)
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape).astype(dtype)
    heads = lambda x, w: jnp.einsum("bnhd,hde->bnhe", x, w)
    # Sums of up to 60 terms: in another order, or rounded to 8 bits in the end.
    error = dict(rtol=1e-5, atol=1e-5) if dtype == jnp.float32 else dict(rtol=1e-2, atol=2e-2)
    for product, wanted, x, w in (
        (matmul_by_parts, jnp.matmul, draw(0, 2, tokens, 6), draw(1, 6, 3)),
        (heads_matmul_by_parts, heads, draw(0, 2, tokens, 3, 4), draw(1, 3, 4, 5)),
    ):
        out, vjp = jax.vjp(product, x, w)
        exact, exact_vjp = jax.vjp(wanted, x.astype(jnp.float32), w.astype(jnp.float32))
        gradient = jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(dtype)
        expected = (exact, *exact_vjp(gradient.astype(jnp.float32)))
        for a, b in zip((out, *vjp(gradient)), expected, strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(np.asarray(a, np.float32), b, **error)
    assert heads_matmul(x, w).shape == (2, tokens, 3, 5)


def test_parts_lie_on_one_device_each():
    """No gradient of a kernel moves tokens between the devices that share a clip."""
    mesh = sharding.make_mesh(MeshConfig(data=1, context=4), jax.devices()[:4])
    place = jax.NamedSharding(mesh, jax.P(None, "context"))
    x, y = (jnp.ones((2, 24, 8), device=place) for _ in range(2))
    with jax.set_mesh(mesh):
        run = jax.jit(lambda x, y: linear._sum_of_parts("bpni,bpno->bpio", x, y, jnp.ones((8, 8))))
        program = run.lower(x, y).compile().as_text()
    np.testing.assert_array_equal(run(x, y), np.full((8, 8), 48))
    assert "all-reduce" in program
    assert not any(name in program for name in ("all-gather", "all-to-all", "collective-permute"))
