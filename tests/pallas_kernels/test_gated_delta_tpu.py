"""The TPU kernels on a CPU, interpreted with poisoned memory and a race detector."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrence_cases
from jax.experimental.pallas import tpu as pltpu
from recurrence_cases import (
    CASES,
    NAMES,
    TOLERANCES,
    in_bfloat16,
    make_cotangent,
    states_and_gradients,
    undamped,
)
from recurrence_cases import make_inputs as make_any_inputs

from pallas_kernels import gated_delta_states
from pallas_kernels.gated_delta import tpu
from pallas_kernels.gated_delta.api import states_by
from pallas_kernels.gated_delta.plan import Plan

make_inputs = functools.partial(make_any_inputs, batch=1, key=128, value=128)

# How much further than TOLERANCES rounding errors may add up where nothing damps them: n alike
# tokens amplify the error of |k|^2, here a plain sum of 128 squares, 2 n times.
UNDAMPED = {"float32": 5, "high": 1, "bfloat16": 1}


@pytest.fixture(autouse=True)
def no_race(capsys):
    """The interpreter of the older jax prints what it finds; the newer one raises."""
    yield
    assert "RACE DETECTED" not in capsys.readouterr().out


def interpreted(*inputs, block_size, chunk_size=None, precision="default"):
    operand = jnp.float32 if precision == "high" else inputs[0].dtype
    interpreter = pltpu.InterpretParams(
        detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise"
    )
    plan = Plan(block_size, chunk_size, jnp.dtype(operand), jnp.dtype(jnp.float32), interpreter)
    assert tpu.unsupported_reason(plan, *inputs[:2]) is None
    return states_by("tpu", plan, *inputs)


def by_chunks(inputs, block_size, **options):
    run = states_and_gradients(interpreted, block_size=block_size, **options)
    return run(inputs, make_cotangent(inputs, block_size))


assert_matches = functools.partial(recurrence_cases.assert_matches, by_chunks)


@pytest.mark.parametrize(
    "operands",
    ["bfloat16", *(pytest.param(name, marks=pytest.mark.slow) for name in ("float32", "high"))],
)
def test_ragged_blocks(operands):
    """Past the end of a block lie poison and the next block's tokens."""
    assert_matches(make_inputs(195), 65, operands, chunk_size=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("time", "chunk_size"),
    [(1, 128), (63, 64), (64, 64), (65, 64), (65, 128), (127, 128), (128, 128), (129, 128)],
)
def test_any_length(time, chunk_size):
    assert_matches(make_inputs(2 * time), time, "bfloat16", chunk_size=chunk_size)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("time", "operands"),
    [(1560, "float32"), (1560, "high"), (1560, "bfloat16"), (4680, "bfloat16")],
)
def test_true_lengths(time, operands):
    assert_matches(make_inputs(time, heads=1), time, operands)


@pytest.mark.slow
@pytest.mark.parametrize("operands", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_any_keys_beta_and_decay(case, operands):
    factor = UNDAMPED[operands] if undamped(case) else 1
    assert_matches(make_inputs(150, **CASES[case]), 75, operands, factor)


@pytest.mark.parametrize(
    "case", ["identical keys, beta 1.999, g 0", "repeated frames, beta 1, reset"]
)
def test_alike_keys_in_bfloat16(case):
    assert_matches(make_inputs(195, **CASES[case]), 65, "bfloat16", chunk_size=64)


@pytest.mark.slow
def test_groups_of_heads_batches_and_wide_values():
    inputs = make_any_inputs(65, batch=2, heads=8, key=128, value=256)
    assert_matches(inputs, 65, "bfloat16")


def test_a_reset_forgets_exactly():
    inputs = in_bfloat16(make_inputs(195, seed=1))
    inputs[2][:, 100] = -1e4
    other = [np.array(x) for x in in_bfloat16(make_inputs(195, seed=5))]
    for x, y in zip(other[:4], inputs[:4], strict=True):
        x[:, 100:] = y[:, 100:]
    cotangent = make_cotangent(inputs, 65)
    cotangent[:, :2] = 0  # of states from before the reset
    run = states_and_gradients(interpreted, block_size=65, chunk_size=64)
    states, *gradients, initial = run(inputs, cotangent)
    np.testing.assert_array_equal(states[:, 2:], run(tuple(other), cotangent)[0][:, 2:])
    assert all((np.asarray(x, np.float32)[:, :100] == 0).all() for x in gradients)
    assert (np.asarray(gradients[2])[:, 100] == 0).all()
    assert (np.asarray(initial) == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("token", [0, 64, 65, 194])
def test_a_reset_anywhere(token):
    inputs = make_inputs(195)
    inputs[2][:, token] = -1e4
    for chunk_size in (64, 128):
        assert_matches(inputs, 65, chunk_size=chunk_size)


@pytest.mark.slow
def test_inert_tokens_leak_nothing():
    """beta = 0 and g = 0 make a token the identity, whatever its key and value hold."""
    inputs = make_inputs(150)
    inert = np.arange(150) % 75 >= 50
    inputs[2][:, inert] = inputs[3][:, inert] = 0
    results = []
    for seed, scale in ((3, 1.0), (4, 1e3)):
        k, v, *rest = (x.copy() for x in inputs)
        rng = np.random.default_rng(seed)
        for x in (k, v):
            x[:, inert] = scale * rng.normal(size=x[:, inert].shape)
        results.append(by_chunks((k, v, *rest), 75))
    for name, x, y in zip(NAMES, *results, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        if name in ("k", "v"):
            assert (x[:, inert] == 0).all() and (y[:, inert] == 0).all()
        if name == "beta":  # how a token that begins to write would matter does depend on it
            x, y = x[:, ~inert], y[:, ~inert]
        np.testing.assert_array_equal(x, y, err_msg=name)


@pytest.mark.slow
def test_many_blocks_stay_accurate():
    inputs = make_inputs(84 * 72, heads=1)
    inputs[2][:] *= 1e-2  # memory over many blocks
    assert_matches(inputs, 72, "bfloat16")


def test_unsupported_reasons():
    def reason(key=128, value=128, dtype=jnp.bfloat16, chunk_size=None, interpret=True):
        k, v = (jax.ShapeDtypeStruct((1, 8, 2, dim), dtype) for dim in (key, value))
        plan = Plan(8, chunk_size, jnp.bfloat16, jnp.float32, interpret)
        return tpu.unsupported_reason(plan, k, v)  # pyright: ignore[reportArgumentType]

    assert reason() is None
    assert reason(value=256, chunk_size=64, dtype=jnp.float32) is None
    assert reason(interpret=False) == "needs a TPU; the device is cpu"
    assert reason(dtype=jnp.float64) == "takes float32 and bfloat16; k is float64"
    assert reason(key=96) == "takes head dims that are multiples of 128; K is 96, V 128"
    assert reason(chunk_size=32) == "takes chunks of 64 or 128 tokens; chunk_size is 32"


def test_a_named_implementation_never_falls_back():
    k, gates = jnp.zeros((1, 8, 1, 128)), jnp.zeros((1, 8, 1))
    with pytest.raises(NotImplementedError, match="implementation 'tpu' needs a TPU"):
        gated_delta_states(k, k, gates, gates, block_size=8, implementation="tpu")
