"""Softmax attention against float64, with key buffers that are filled in part; the dispatch."""

import functools
import importlib
import itertools
import logging

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pallas_kernels import devices, dot_product_attention, merge_attention
from pallas_kernels.attention import api, cudnn, gpu, lse, splash

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


def lse_oracle(q, k, lengths):
    """Natural log-sum-exp [B, Tq, H] of the first keys of each row, in float64."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    scores = np.einsum("bqhd,bkhd->bqhk", q, k) / np.sqrt(q.shape[-1])
    rows = [np.logaddexp.reduce(x[..., :n], axis=-1) for x, n in zip(scores, lengths, strict=True)]
    return np.stack(rows)


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


def both(call, *inputs):
    """Results of a form with lse, and the gradients of a loss of both; -inf has no part in it."""

    def loss(*inputs):
        out, lse = call(*inputs)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sin(out.astype(jnp.float32)).sum() + jnp.cos(3 * finite).sum()

    return *call(*inputs), *jax.grad(loss, argnums=tuple(range(len(inputs))))(*inputs)


@pytest.mark.parametrize("garbage", [0.0, np.nan, np.inf])
def test_gradients_through_lse(garbage):
    """A row without visible keys has none; a row of 7 keys has those of 7 keys alone."""
    q, k, v = make_inputs()
    spoiled = [x.at[0].set(garbage).at[1, 7:].set(garbage) for x in (k, v)]
    lengths = jnp.asarray([0, 7])
    out, lse, *found = jax.jit(
        functools.partial(both, functools.partial(xla, key_length=lengths, return_lse=True))
    )(q, *spoiled)
    assert (out[0] == 0).all() and (lse[0] == -jnp.inf).all()
    assert all((x[0] == 0).all() for x in found)
    assert all((x[1, 7:] == 0).all() for x in found[1:])
    short = functools.partial(xla, return_lse=True)
    expected = both(short, q[1:], k[1:, :7], v[1:, :7])[2:]
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


# Every split leaves the order of keys; two have an empty part.
SPLITS = [(5,), (1, 8), (0,), (3, 3)]


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("length", [None, [0, 4], [12, 9]])
def test_merged_parts_equal_the_whole(length, splits):
    """Values and gradients; parts may be empty, or hidden in full for some rows."""
    inputs = make_inputs()
    edges = [0, *splits, KEYS]
    shown = jnp.asarray([KEYS, KEYS] if length is None else length)

    def merged(q, k, v):
        parts = []
        for start, end in itertools.pairwise(edges):
            some = None if length is None else jnp.maximum(shown - start, 0)
            part = (q, k[:, start:end], v[:, start:end])
            parts.append(xla(*part, key_length=some, return_lse=True))
        return merge_attention(parts)

    whole = functools.partial(xla, key_length=shown, return_lse=True)
    found, expected = (jax.jit(functools.partial(both, f))(*inputs) for f in (merged, whole))
    for x, y in zip(found, expected, strict=True):
        # float32, in another order of sums.
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)


def test_merging_nothing_is_nothing():
    """Zeros and -inf, without NaN in any gradient."""
    q = make_inputs()[0]
    parts = [(jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf))] * 3
    out, lse = merge_attention(parts)
    assert (out == 0).all() and (lse == -jnp.inf).all()
    _, vjp = jax.vjp(merge_attention, parts)
    (cotangents,) = vjp((jnp.ones_like(out), jnp.ones_like(lse)))
    assert all((x == 0).all() for x in jax.tree.leaves(cotangents))


def test_merging_keeps_the_first_dtype_and_far_apart_sums():
    q = make_inputs(jnp.bfloat16)[0]
    level = jnp.full(q.shape[:3], 1.0)
    out, lse = merge_attention([(q, 1e4 * level), (2 * q.astype(jnp.float32), -1e4 * level)])
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(out, q)
    np.testing.assert_array_equal(lse, 1e4 * level)
    out, lse = merge_attention([(q, level)])
    np.testing.assert_array_equal(out, q)
    np.testing.assert_array_equal(lse, level)


NO_PARTS = np.zeros((2, 5, 3, 8)), np.zeros((2, 5, 3))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "parts is empty"),
        ([(np.zeros((5, 3, 8)), np.zeros((5, 3)))], r"out of part 0 .* must be \[B, Tq, H, D\]"),
        ([NO_PARTS, (np.zeros((2, 6, 3, 8)), NO_PARTS[1])], "out of part 1 .* that of part 0"),
        ([NO_PARTS, (NO_PARTS[0], np.zeros((2, 3, 5)))], r"lse of part 1 .* must be \(2, 5, 3\)"),
    ],
)
def test_parts_that_cannot_be_merged(parts, message):
    with pytest.raises(ValueError, match=message) as error:
        merge_attention(parts)
    assert "\n" not in str(error.value)


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

    found = jax.jit(lambda i, *x: both(functools.partial(stacked, i), *x))(layer, q, k, v)
    expected = jax.jit(functools.partial(both, sliced))(q, k, v)
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layer", "same"), [(-1, 0), (3, 2), (np.uint8(255), 2)])
def test_layers_are_clamped(layer, same):
    q, *kv = make_inputs()
    k, v = (jnp.stack([-x, 2 * x, x]) for x in kv)
    np.testing.assert_array_equal(xla(q, k, v, layer=layer), xla(q, k[same], v[same]))


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
        functools.partial(both, functools.partial(call, return_lse=True, implementation=name))
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
    both = functools.partial(call, return_lse=True)
    mapped = jax.vmap(lambda *x: both(*(x[None] for x in x)))(q, k, v)
    for x, y in zip(mapped, both(q, k, v), strict=True):
        assert relative_error(x[:, 0], y) < 1e-6


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "length"), [(4680, 4680, 128, None), (63, 65, 64, [7, 65])]
)
def test_the_hopper_kernel_lowers_anywhere(queries, keys, dim, length):
    inputs = [jax.ShapeDtypeStruct((2, n, 3, dim), jnp.bfloat16) for n in (queries, keys, keys)]
    length = None if length is None else jnp.asarray(length)
    traced = jax.jit(lambda *x: gpu.attention(*x, length)).trace(*inputs)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("call", [gpu.attention, gpu.attention_with_lse])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(4680, 4680, 128), (63, 64, 64)])
def test_the_hopper_kernel_reads_layers_in_place(queries, keys, dim, call):
    """All layers reach the kernel, and no slice of them is made; lse goes to whole tiles."""
    sizes = [(2, queries, 3, dim), *[(5, 2, keys, 3, dim)] * 2]
    inputs = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.jit(lambda q, k, v, i: call(q, k, v, None, i)).trace(*inputs, scalar)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (kernel,) = (line for line in text.splitlines() if "@mosaic_gpu" in line)
    *_, signature = kernel.split(" : (")
    assert signature.count(f"tensor<10x{keys}x3x{dim}xbf16>") == 2
    assert "dynamic_slice" not in text
    if call is gpu.attention_with_lse:
        assert f"tensor<2x3x{-(-queries // 128) * 128}xf32>" in signature
        assert [x.shape for x in traced.out_info] == [sizes[0], sizes[0][:3]]


def test_two_calls_of_the_hopper_kernel_are_one_to_xla():
    """Wherever they stand in a program: a layer and its teacher attend to the same block."""

    def both(q, k, v, w):
        out, lse = gpu.attention_with_lse(q, k, v, None)
        loss = lambda w: jnp.sum((gpu.attention(q, k, v, None) * w).astype(jnp.float32))
        return out, lse, jax.value_and_grad(loss)(w)

    inputs = [jax.ShapeDtypeStruct((2, 128, 3, 64), jnp.bfloat16)] * 4
    text = jax.jit(both).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("call @_kernel(") == 2
    assert len([line for line in text.splitlines() if "@mosaic_gpu" in line]) == 1


def test_the_hopper_kernel_slices_layers_that_it_pads():
    """Numbers of keys that are no multiple of 8 cost a copy of one layer, not of all."""
    sizes = [(2, 63, 3, 64), *[(5, 2, 65, 3, 64)] * 2]
    inputs = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    traced = jax.jit(lambda q, k, v, i: gpu.attention(q, k, v, None, i)).trace(*inputs, 3)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "tensor<2x72x3x64xbf16>" in text and "x72x3x64xbf16> -> tensor<5" not in text


@pytest.fixture
def cudnn_at_hand(monkeypatch):
    """Lets calls of cuDNN be traced where it is not."""
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize("length", [None, [7, 65]])
def test_lse_of_cudnn_lowers_anywhere(length, cudnn_at_hand):
    """JAX has it in float32 under a private name: that name and its options are there."""
    inputs = [jax.ShapeDtypeStruct((2, n, 3, 64), jnp.bfloat16) for n in (63, 65, 65)]
    length = None if length is None else jnp.asarray(length)
    call = lambda q, k, v: cudnn.attention_with_lse(q, k, v, length)
    traced = jax.jit(call).trace(*inputs)
    shapes = [(x.shape, x.dtype) for x in traced.out_info]
    assert shapes == [((2, 63, 3, 64), jnp.bfloat16), ((2, 63, 3), jnp.float32)]
    assert "fmhaSoftmax" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("keys", [64, 65])
@pytest.mark.parametrize("backend", [cudnn, gpu])
def test_gradients_for_a_layer_lower_anywhere(backend, keys, return_lse, cudnn_at_hand):
    sizes = [(2, 63, 3, 64), *[(5, 2, keys, 3, 64)] * 2]
    inputs = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]

    def loss(q, k, v, length, layer):
        if not return_lse:
            return backend.attention(q, k, v, length, layer).astype(jnp.float32).sum()
        out, sums = lse.with_lse(backend.attention_with_lse, q, k, v, length, layer)
        return out.astype(jnp.float32).sum() + sums.sum()

    scalars = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*inputs, *scalars)
    assert [x.shape for x in traced.out_info] == sizes
    assert traced.lower(lowering_platforms=("cuda",)).as_text()


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
        return jax.jit(functools.partial(both, call))(q, *stacks)

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
        assert relative_error(x, y) <= 1e-2


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
