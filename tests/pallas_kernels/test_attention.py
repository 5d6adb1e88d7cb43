"""Softmax attention against float64, with key buffers that are filled in part; the dispatch."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BATCH,
    DIM,
    HEADS,
    KEYS,
    QUERIES,
    lse_oracle,
    make_inputs,
    oracle,
    with_gradients,
    xla,
)
from jax.sharding import PartitionSpec

from pallas_kernels import devices, dot_product_attention
from pallas_kernels.attention import api


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


LENGTHS = [None, 0, 7, 100, [0, KEYS], [5, 9]]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_lse_matches_float64(dtype, length):
    q, k, v = make_inputs(dtype)
    q = 30 * q  # exponentials of such scores overflow
    out, lse = jax.jit(functools.partial(xla, key_length=length, return_lse=True))(q, k, v)
    assert (out.dtype, lse.dtype, lse.shape) == (dtype, jnp.float32, q.shape[:3])
    np.testing.assert_array_equal(out, jax.jit(functools.partial(xla, key_length=length))(q, k, v))
    shown = np.broadcast_to(KEYS if length is None else np.minimum(length, KEYS), (BATCH,))
    # Products of bfloat16 are exact in float32, whose sums have 24 bits.
    np.testing.assert_allclose(lse, lse_oracle(q, k, shown), rtol=1e-5, atol=1e-5)


def test_no_keys_at_all():
    q, k, v = make_inputs(keys=0)
    out, lse = xla(q, k, v, return_lse=True)
    assert out.shape == q.shape and (out == 0).all() and (lse == -jnp.inf).all()


@pytest.mark.parametrize("garbage", [0.0, np.nan, np.inf])
def test_gradients_through_lse(garbage):
    """A row without visible keys has none; a row of 7 keys has those of 7 keys alone."""
    q, k, v = make_inputs()
    spoiled = [x.at[0].set(garbage).at[1, 7:].set(garbage) for x in (k, v)]
    lengths = jnp.asarray([0, 7])
    out, lse, *found = jax.jit(
        functools.partial(
            with_gradients, functools.partial(xla, key_length=lengths, return_lse=True)
        )
    )(q, *spoiled)
    assert (out[0] == 0).all() and (lse[0] == -jnp.inf).all()
    assert all((x[0] == 0).all() for x in found)
    assert all((x[1, 7:] == 0).all() for x in found[1:])
    short = functools.partial(xla, return_lse=True)
    expected = with_gradients(short, q[1:], k[1:, :7], v[1:, :7])[2:]
    for x, y in zip((found[0][1:], *(x[1:, :7] for x in found[1:])), expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_lse_is_that_of_a_difference():
    q, k, v = make_inputs()
    loss = lambda q: jnp.sum(jnp.sin(xla(q, k, v, key_length=9, return_lse=True)[1]))
    direction = jnp.cos(jnp.arange(q.size)).reshape(q.shape)
    slope = jnp.vdot(jax.grad(loss)(q), direction)
    step = 1e-2
    difference = (loss(q + step * direction) - loss(q - step * direction)) / (2 * step)
    # float32 sums of size 10 over a step of 0.02, and the third derivative times its square.
    np.testing.assert_allclose(slope, difference, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("layer", [0, 2, np.uint8(1)])
def test_a_traced_layer_equals_the_slice(layer, return_lse):
    """Values and gradients: those of other layers are zero."""
    q, *kv = make_inputs()
    k, v = (jnp.stack([-x, 2 * x, x]) for x in kv)
    call = functools.partial(xla, key_length=7, return_lse=True)

    def stacked(i, *inputs):
        found = xla(*inputs, key_length=7, layer=i, return_lse=return_lse)
        return found if return_lse else (found, jnp.zeros(q.shape[:3]))

    def sliced(*inputs):
        out, lse = call(inputs[0], inputs[1][layer], inputs[2][layer])
        return out, lse if return_lse else jnp.zeros_like(lse)

    found = jax.jit(lambda i, *x: with_gradients(functools.partial(stacked, i), *x))(layer, q, k, v)
    expected = jax.jit(functools.partial(with_gradients, sliced))(q, k, v)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layer", "same"), [(-1, 0), (3, 2), (np.uint8(255), 2)])
def test_layers_are_clamped(layer, same):
    q, *kv = make_inputs()
    k, v = (jnp.stack([-x, 2 * x, x]) for x in kv)
    np.testing.assert_array_equal(xla(q, k, v, layer=layer), xla(q, k[same], v[same]))


def test_none_picks_xla_for_float32_and_logs_it_once(caplog):
    inputs = make_inputs(queries=QUERIES + 1)
    api._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for _ in range(2):
            np.testing.assert_array_equal(dot_product_attention(*inputs), xla(*inputs))
    (record,) = caplog.records
    assert record.getMessage().startswith("dot_product_attention: xla on ")


@pytest.mark.parametrize("name", ["cudnn", "gpu", "splash"])
def test_a_named_implementation_never_falls_back(name):
    message = rf"implementation '{name}' needs (an NVIDIA GPU|a TPU|compute|bfloat16)"
    with pytest.raises(NotImplementedError, match=message):
        dot_product_attention(*make_inputs(), implementation=name)


def test_a_mesh_is_unsupported_outside_shard_map():
    """Where XLA would have to split a call over devices."""
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=auto, devices=jax.devices()[:2])):
        assert "jax.shard_map over ['data']" in devices.unsupported_mesh_reason()
        parts = PartitionSpec("data")

        def inside(x):
            assert devices.unsupported_mesh_reason() is None
            return x

        jax.shard_map(inside, in_specs=parts, out_specs=parts)(jnp.zeros(2))
    assert devices.unsupported_mesh_reason() is None


STACKS = {name: jnp.zeros((4, 2, 12, 3, 8)) for name in "kv"}
INVALID = {
    "q has shape": {"q": jnp.zeros((2, 5, 8))},
    "q has dtype": {"q": jnp.zeros((2, 5, 3, 8), jnp.int32)},
    "k has shape": {"k": jnp.zeros((2, 12, 1, 8))},
    "k has dtype": {"k": jnp.zeros((2, 12, 3, 8), jnp.bfloat16)},
    "v has shape": {"v": jnp.zeros((2, 11, 3, 8))},
    "v has dtype": {"v": jnp.zeros((2, 12, 3, 8), jnp.bfloat16)},
    "key_length has dtype": {"key_length": 3.0},
    "key_length has shape": {"key_length": jnp.zeros(3, jnp.int32)},
    r"k has shape .* without layer \[B, Tk, H, D\]": {"k": jnp.zeros((4, 2, 12, 3, 8))},
    r"k has shape .* with layer \[L, B, Tk, H, D\]": {"layer": 0},
    r"k has shape \(0,": {"layer": 0, "k": jnp.zeros((0, 2, 12, 3, 8))},
    "v has shape .* must be that of k": {"layer": 0, "k": jnp.zeros((4, 2, 12, 3, 8))},
    "layer has dtype float32": {"layer": 1.0, **STACKS},
    "layer has dtype bool": {"layer": True, **STACKS},
    "layer has shape": {"layer": jnp.zeros(1, jnp.int32), **STACKS},
    "implementation is 'flash'; must be None or one of": {"implementation": "flash"},
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_arguments(message):
    arguments = dict(zip("qkv", make_inputs(), strict=True))
    with pytest.raises(ValueError, match=message) as error:
        dot_product_attention(**(arguments | INVALID[message]))
    assert "\n" not in str(error.value)
