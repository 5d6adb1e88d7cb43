"""Kernels of softmax attention against XLA and float64: on their device, or interpreted."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BATCH,
    lse_oracle,
    make_inputs,
    oracle,
    relative_error,
    with_gradients,
    xla,
)

from pallas_kernels import dot_product_attention
from pallas_kernels.attention import lse, splash


def on_this_device(name):
    try:
        jax.eval_shape(functools.partial(dot_product_attention, implementation=name), *HALVES)
    except NotImplementedError as error:
        return pytest.param(name, marks=pytest.mark.skip(reason=str(error)))
    return name


HALVES = make_inputs(jnp.bfloat16, dim=64)
ON_DEVICES = [on_this_device(name) for name in ("cudnn", "gpu", "splash")]
SIZES = [(1, 1, None), (63, 65, None), (130, 128, 127), (129, 700, [500, 129]), (8, 300, [0, 300])]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys", "length"), SIZES)
@pytest.mark.parametrize("name", ON_DEVICES)
def test_kernels_match_xla(name, queries, keys, length, dim):
    """Outputs and gradients, at lengths that no tile divides."""
    inputs = make_inputs(jnp.bfloat16, queries, keys, dim)
    length = None if length is None else jnp.asarray(length)

    @functools.partial(jax.jit, static_argnums=0)
    def run(name, *inputs):
        call = functools.partial(dot_product_attention, key_length=length, implementation=name)
        out, vjp = jax.vjp(call, *inputs)
        return call(*inputs), *vjp(
            jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype)
        )

    expected = run("xla", *(x.astype(jnp.float32) for x in inputs))
    for x, y in zip(run(name, *inputs), expected, strict=True):
        assert relative_error(x, y) <= 1e-2 or (keys == 1 and np.abs(y).max() < 1e-6)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("queries", "keys", "length"), [*SIZES, (1000, 1560, [0, 1111])])
@pytest.mark.parametrize("name", ON_DEVICES)
def test_lse_of_kernels_matches_float64(name, queries, keys, length, dim):
    """Beside the output of the plain form."""
    q, k, v = make_inputs(jnp.bfloat16, queries, keys, dim)
    shown = None if length is None else jnp.asarray(length)
    call = functools.partial(dot_product_attention, key_length=shown, implementation=name)
    out, lse = jax.jit(functools.partial(call, return_lse=True))(q, k, v)
    assert lse.dtype == jnp.float32
    assert np.isfinite(np.asarray(out, np.float32)).all()
    # The same kernel, or another of cuDNN's; outputs have 8 bits.
    assert relative_error(out, jax.jit(call)(q, k, v)) <= 4e-3
    lengths = np.broadcast_to(keys if length is None else np.asarray(length), (BATCH,))
    # Sums are float32, of exponentials that the hardware approximates to 22 bits. Splash attention
    # rounds scaled queries to 8 bits, for scores of up to 5.
    tolerance = {"gpu": 1e-4, "cudnn": 1e-3, "splash": 2e-2}[name]
    np.testing.assert_allclose(lse, lse_oracle(q, k, lengths), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ON_DEVICES)
def test_gradients_of_kernels_through_lse(name):
    inputs = make_inputs(jnp.bfloat16, 130, 300, 64)
    call = functools.partial(dot_product_attention, key_length=jnp.asarray([0, 131]))
    run = lambda name, *x: jax.jit(
        functools.partial(
            with_gradients, functools.partial(call, return_lse=True, implementation=name)
        )
    )(*x)
    expected = run("xla", *(x.astype(jnp.float32) for x in inputs))[2:]
    for x, y in zip(run(name, *inputs)[2:], expected, strict=True):
        assert relative_error(x, y) <= 2e-2  # bfloat16 has 8 bits, and cotangents are of it


@pytest.mark.parametrize("keys", [300, 304])  # "gpu" reads the second in place
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("name", ON_DEVICES)
def test_layers_of_kernels(name, return_lse, keys):
    """Of three, whose others are NaN: nothing of them is read."""
    q, *kv = make_inputs(jnp.bfloat16, 130, keys, 128)
    call = functools.partial(
        dot_product_attention, key_length=200, return_lse=return_lse, implementation=name
    )
    expected = jax.jit(call)(q, *kv)
    for layer in range(3):
        k, v = (jnp.full((3, *x.shape), np.nan, x.dtype).at[layer].set(x) for x in kv)
        found = jax.jit(lambda i, q, k, v: call(q, k, v, layer=i))(layer, q, k, v)
        chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("name", ON_DEVICES)
def test_gradients_of_a_layer(name):
    q, *kv = make_inputs(jnp.bfloat16, 130, 304, 64)
    k, v = (jnp.stack([-x, x]) for x in kv)
    call = functools.partial(dot_product_attention, key_length=200, implementation=name)
    loss = lambda q, k, v, i: jnp.sin(call(q, k, v, layer=i).astype(jnp.float32)).sum()
    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v, 1)
    expected = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)(q, *kv, None)
    for x, y in zip((found[0], *(x[1] for x in found[1:])), expected, strict=True):
        assert relative_error(x, y) <= 1e-2  # some sums are in no fixed order
    assert all((x[0] == 0).all() for x in found[1:])


@pytest.mark.parametrize("name", ON_DEVICES)
def test_kernels_under_vmap(name):
    q, k, v = make_inputs(jnp.bfloat16, 130, 300, 128)
    call = functools.partial(dot_product_attention, key_length=200, implementation=name)
    mapped = jax.vmap(lambda *x: call(*(x[None] for x in x))[0])(q, k, v)
    assert relative_error(mapped, call(q, k, v)) < 1e-6
    with_lse = functools.partial(call, return_lse=True)
    mapped = jax.vmap(lambda *x: with_lse(*(x[None] for x in x)))(q, k, v)
    for x, y in zip(mapped, with_lse(q, k, v), strict=True):
        assert relative_error(x[:, 0], y) < 1e-6


def interpreted_splash(*inputs, length=None):
    return splash.attention(*inputs, length, interpret=True)


@pytest.mark.parametrize(
    ("keys", "length"),
    [(140, None), pytest.param(1100, [600, 0], marks=pytest.mark.slow)],
)
def test_splash_matches_float64(keys, length):
    """In interpret mode; of 1100 keys some blocks are skipped."""
    q, k, v = make_inputs(jnp.bfloat16, 130, keys, 64)
    shown = None if length is None else jnp.asarray(length)
    out = jax.jit(functools.partial(interpreted_splash, length=shown))(q, k, v)
    for i, n in enumerate(length or [keys] * BATCH):
        row = oracle(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n]) if n else 0 * q[i : i + 1]
        # bfloat16 has 8 bits, and outputs are of size 1.
        np.testing.assert_allclose(np.asarray(out[i : i + 1], np.float64), row, atol=2e-2)


@pytest.mark.parametrize(
    ("keys", "length"),
    [
        (128, None),
        (140, None),
        (140, [0, 131]),
        pytest.param(1100, [600, 0], marks=pytest.mark.slow),
    ],
)
def test_lse_of_splash_matches_float64(keys, length):
    """In interpret mode, for a layer of a stack; gradients are XLA's."""
    q, k, v = make_inputs(jnp.bfloat16, 130, keys, 64)
    shown = None if length is None else jnp.asarray(length)
    stacks = [jnp.stack([jnp.zeros_like(x), x]) for x in (k, v)]
    kernel = functools.partial(splash.attention_with_lse, interpret=True)

    def run(call):
        return jax.jit(functools.partial(with_gradients, call))(q, *stacks)

    layer = jnp.asarray(1)
    out, lse_, *gradients = run(lambda *x: lse.with_lse(kernel, *x, shown, layer))
    assert (lse_.dtype, lse_.shape) == (jnp.float32, q.shape[:3])
    # 1 / sqrt(64) scales queries without rounding; products are exact, and sums float32.
    lengths = length or [keys] * BATCH
    np.testing.assert_allclose(lse_, lse_oracle(q, k, lengths), rtol=1e-5, atol=1e-5)
    expected = run(functools.partial(xla, key_length=shown, layer=layer, return_lse=True))
    for x, y in zip((out, *gradients), (expected[0], *expected[2:]), strict=True):
        assert relative_error(x, y) <= 1e-2  # bfloat16 has 8 bits
        assert (np.asarray(x)[np.asarray(y) == 0] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("length", [None, [600, 90]])
def test_gradients_of_splash(length):
    inputs = make_inputs(jnp.bfloat16, 130, 700, 64)
    length = None if length is None else jnp.asarray(length)

    def gradients(call, *inputs):
        loss = lambda *x: jnp.sum(jnp.sin(call(*x).astype(jnp.float32)))
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*inputs)

    found = gradients(functools.partial(interpreted_splash, length=length), *inputs)
    expected = gradients(
        functools.partial(xla, key_length=length), *(x.astype(jnp.float32) for x in inputs)
    )
    for x, y in zip(found, expected, strict=True):
        assert relative_error(x, y) <= 1e-2  # bfloat16 has 8 bits
