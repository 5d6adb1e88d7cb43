"""Softmax attention against float64, with key buffers that are filled in part; the dispatch."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import devices, dot_product_attention
from pallas_kernels.attention import api, gpu, splash

BATCH, QUERIES, KEYS, HEADS, DIM = 2, 5, 12, 3, 8
xla = functools.partial(dot_product_attention, implementation="xla")


def make_inputs(dtype=np.float32, queries=QUERIES, keys=KEYS, dim=DIM):
    rng = np.random.default_rng(0)
    sizes = [(BATCH, n, HEADS, dim) for n in (queries, keys, keys)]
    return tuple(jnp.asarray(rng.normal(size=size), dtype) for size in sizes)


def oracle(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
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


def relative_error(x, expected):
    x, expected = (np.asarray(x, np.float64) for x in (x, expected))
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)


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


def test_a_mesh_is_an_obstacle_outside_shard_map():
    """Where XLA would have to split a call over devices."""
    auto = (jax.sharding.AxisType.Auto,)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=auto, devices=jax.devices()[:2])):
        assert "jax.shard_map over ['data']" in devices.split_by_xla()
        parts = PartitionSpec("data")

        def inside(x):
            assert devices.split_by_xla() is None
            return x

        jax.shard_map(inside, in_specs=parts, out_specs=parts)(jnp.zeros(2))
    assert devices.split_by_xla() is None


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
        return call(*inputs), *vjp(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out))

    expected = run("xla", *(x.astype(jnp.float32) for x in inputs))
    for x, y in zip(run(name, *inputs), expected, strict=True):
        assert relative_error(x, y) <= 1e-2 or (keys == 1 and np.abs(y).max() < 1e-6)


@pytest.mark.parametrize("name", ON_DEVICES)
def test_kernels_under_vmap(name):
    q, k, v = make_inputs(jnp.bfloat16, 130, 300, 128)
    call = functools.partial(dot_product_attention, key_length=200, implementation=name)
    mapped = jax.vmap(lambda *x: call(*(x[None] for x in x))[0])(q, k, v)
    assert relative_error(mapped, call(q, k, v)) < 1e-6


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "length"), [(4680, 4680, 128, None), (63, 65, 64, [7, 65])]
)
def test_the_hopper_kernel_lowers_anywhere(queries, keys, dim, length):
    inputs = [jax.ShapeDtypeStruct((2, n, 3, dim), jnp.bfloat16) for n in (queries, keys, keys)]
    length = None if length is None else jnp.asarray(length)
    traced = jax.jit(lambda *x: gpu.attention(*x, length)).trace(*inputs)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


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
        assert relative_error(x, y) <= 1e-2


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
