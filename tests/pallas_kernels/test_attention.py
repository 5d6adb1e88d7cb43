"""Softmax attention in XLA against float64, with key buffers that are filled in part."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dot_product_attention

BATCH, QUERIES, KEYS, HEADS, DIM = 2, 5, 12, 3, 8
xla = functools.partial(dot_product_attention, implementation="xla")


def make_inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    sizes = [(BATCH, n, HEADS, DIM) for n in (QUERIES, KEYS, KEYS)]
    return tuple(jnp.asarray(rng.normal(size=size), dtype) for size in sizes)


def oracle(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(DIM)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


@jax.jit
def gradients(q, k, v, key_length):
    def loss(q, k, v):
        return jnp.sum(jnp.sin(xla(q, k, v, key_length=key_length)))

    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_matches_float64(dtype, tolerance):
    inputs = make_inputs(dtype)
    out, expected = xla(*inputs), oracle(*inputs)
    assert out.dtype == dtype
    assert np.linalg.norm(np.asarray(out, np.float64) - expected) <= tolerance * np.linalg.norm(
        expected
    )


def test_float64_stays_float64():
    with jax.enable_x64(True):
        inputs = make_inputs(np.float64)
        np.testing.assert_allclose(xla(*inputs), oracle(*inputs), rtol=1e-12)


@pytest.mark.parametrize("length", [1, 7, KEYS])
def test_a_scalar_length_equals_shorter_keys(length):
    q, k, v = make_inputs()
    out = jax.jit(lambda n: xla(q, k, v, key_length=n))(length)
    np.testing.assert_allclose(out, oracle(q, k[:, :length], v[:, :length]), rtol=1e-5, atol=1e-6)


def test_a_length_for_each_row_and_under_vmap():
    q, k, v = make_inputs()
    lengths = jnp.asarray([4, 9])
    out = xla(q, k, v, key_length=lengths)
    for i, n in enumerate(lengths):
        row = oracle(q[i : i + 1], k[i : i + 1, :n], v[i : i + 1, :n])
        np.testing.assert_allclose(out[i : i + 1], row, rtol=1e-5, atol=1e-6)
    mapped = jax.vmap(lambda q, k, v, n: xla(q[None], k[None], v[None], key_length=n)[0])
    np.testing.assert_allclose(mapped(q, k, v, lengths), out, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_garbage_in_masked_slots_never_leaks(garbage):
    q, k, v = make_inputs()
    spoiled = [x.at[:, 7:].set(garbage) for x in (k, v)]
    np.testing.assert_array_equal(xla(q, *spoiled, key_length=7), xla(q, k, v, key_length=7))
    clean, dirty = gradients(q, k, v, 7), gradients(q, *spoiled, 7)
    for x, y in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(x, y)
    assert all((np.asarray(x)[:, 7:] == 0).all() for x in dirty[1:])


def test_gradients_are_those_of_shorter_keys():
    q, k, v = make_inputs()
    dq, dk, dv = gradients(q, k, v, 7)
    shorter = gradients(q, k[:, :7], v[:, :7], 7)
    for x, y in zip((dq, dk[:, :7], dv[:, :7]), shorter, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_no_visible_key_gives_zero():
    q = make_inputs()[0]
    spoiled = jnp.full((BATCH, KEYS, HEADS, DIM), np.nan)
    assert (xla(q, spoiled, spoiled, key_length=0) == 0).all()
    assert all((x == 0).all() for x in gradients(q, spoiled, spoiled, 0))


def test_none_picks_xla_for_float32():
    inputs = make_inputs()
    np.testing.assert_array_equal(dot_product_attention(*inputs), xla(*inputs))


def test_a_named_implementation_never_falls_back():
    with pytest.raises(NotImplementedError, match=r"needs an NVIDIA GPU|needs bfloat16"):
        dot_product_attention(*make_inputs(), implementation="cudnn")


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN runs on NVIDIA GPUs")
@pytest.mark.parametrize("length", [None, 7])
def test_cudnn_matches_float64(length):
    q, k, v = make_inputs(jnp.bfloat16)
    out = dot_product_attention(q, k, v, key_length=length, implementation="cudnn")
    expected = oracle(q, k[:, :length], v[:, :length])
    error = np.linalg.norm(np.asarray(out, np.float64) - expected) / np.linalg.norm(expected)
    assert error <= 1e-2


INVALID = {
    "q has shape": {"q": jnp.zeros((2, 5, 8))},
    "q has dtype": {"q": jnp.zeros((2, 5, 3, 8), jnp.int32)},
    "k has shape": {"k": jnp.zeros((2, 12, 1, 8))},
    "k has dtype": {"k": jnp.zeros((2, 12, 3, 8), jnp.bfloat16)},
    "v has shape": {"v": jnp.zeros((2, 11, 3, 8))},
    "v has dtype": {"v": jnp.zeros((2, 12, 3, 8), jnp.bfloat16)},
    "key_length has dtype": {"key_length": 3.0},
    "key_length has shape": {"key_length": jnp.zeros(3, jnp.int32)},
    "implementation is 'flash'; must be None or one of": {"implementation": "flash"},
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_arguments(message):
    arguments = dict(zip("qkv", make_inputs(), strict=True))
    with pytest.raises(ValueError, match=message) as error:
        dot_product_attention(**(arguments | INVALID[message]))
    assert "\n" not in str(error.value)
