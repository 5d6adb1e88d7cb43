"""The chunked gated delta rule against the token recurrence in float64."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recurrence_cases
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from recurrence_cases import (
    CASES,
    NAMES,
    TOLERANCES,
    assert_close,
    make_cotangent,
    make_inputs,
    oracle,
    states_and_gradients,
    undamped,
)

from arl2_jax.config import ModelConfig
from pallas_kernels import gated_delta_states
from pallas_kernels.gated_delta import api, xla
from pallas_kernels.gated_delta.shapes import SHAPES

# How much further than TOLERANCES rounding errors may add up where nothing damps them.
UNDAMPED = {"float32": 2, "high": 1, "bfloat16": 1}


def chunked(inputs, block_size, **options):
    run = states_and_gradients(block_size=block_size, implementation="xla", **options)
    return run(inputs, make_cotangent(inputs, block_size))


assert_matches = functools.partial(recurrence_cases.assert_matches, chunked)


@pytest.mark.parametrize(
    ("block_size", "blocks"), [(1, 1), (1, 5), (63, 2), (64, 1), (65, 3), (127, 1), (129, 1)]
)
def test_matches_the_recurrence(block_size, blocks):
    assert_matches(make_inputs(block_size * blocks), block_size)


@pytest.mark.slow
@pytest.mark.parametrize("operands", TOLERANCES)
@pytest.mark.parametrize("time", [1, 63, 64, 65, 127, 129, 1560, 4680])
def test_any_length(time, operands):
    assert_matches(make_inputs(time), time, operands)


def test_matches_the_recurrence_at_head_dim_128():
    assert_matches(make_inputs(72, batch=1, heads=1, key=128, value=128), 72)


@pytest.mark.parametrize("operands", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("correlation 0.9,")])
def test_any_beta_and_decay(case, operands):
    factor = UNDAMPED[operands] if undamped(case) else 1
    assert_matches(make_inputs(195, **CASES[case]), 65, operands, factor)


@pytest.mark.slow
@pytest.mark.parametrize("operands", TOLERANCES)
@pytest.mark.parametrize("case", CASES)
def test_any_keys_beta_and_decay(case, operands):
    test_any_beta_and_decay(case, operands)


@pytest.mark.parametrize("keys", [{"correlation": 0}, {"correlation": 1}, {"frame": 13}])
def test_any_keys(keys):
    assert_matches(make_inputs(195, **keys), 65)


@pytest.mark.parametrize(("block_size", "chunk_size"), [(65, 8), (195, 40)])
def test_any_chunk_size(block_size, chunk_size):
    assert_matches(make_inputs(195), block_size, chunk_size=chunk_size)


def test_blocks_in_turn_when_memory_is_short(monkeypatch):
    monkeypatch.setattr(xla, "_MAP_ELEMENTS", 0)
    states_and_gradients.cache_clear()
    assert_matches(make_inputs(195), 65)
    states_and_gradients.cache_clear()


def test_float64_is_computed_in_float64():
    inputs = make_inputs(195)
    with jax.enable_x64(True):
        results = chunked(tuple(np.asarray(x, np.float64) for x in inputs), 65)
        assert all(x.dtype == np.float64 for x in results)
    assert_close(results, oracle(inputs, 65), TOLERANCES["float32"], 1e-8)


@pytest.mark.parametrize("token", [0, 64, 65, 100, 194])
def test_a_reset_forgets_exactly(token):
    k, v, g, beta, state = make_inputs(195)
    g[:, token] = -1e4
    inputs = (k, v, g, beta, state)
    assert_matches(inputs, 65)

    other = [x.copy() for x in make_inputs(195, seed=5)]
    for x, y in zip(other[:4], inputs[:4], strict=True):
        x[:, token:] = y[:, token:]
    after = token // 65 + 1
    results, others = chunked(inputs, 65), chunked(tuple(other), 65)
    np.testing.assert_array_equal(results[0][:, after:], others[0][:, after:])
    assert all(np.isfinite(x).all() for x in results)


def test_no_gradient_passes_a_reset():
    inputs = make_inputs(195)
    inputs[2][:, 100] = -1e4
    cotangent = make_cotangent(inputs, 65)
    cotangent[:, :2] = 0  # of states from before the reset
    run = states_and_gradients(block_size=65, implementation="xla")
    _, *gradients, state = run(inputs, cotangent)
    assert all((np.asarray(x)[:, :100] == 0).all() for x in gradients)
    assert (np.asarray(gradients[2])[:, 100] == 0).all()
    assert (np.asarray(state) == 0).all()


def test_inert_tokens_leak_nothing():
    """beta = 0 and g = 0 make a token the identity, whatever its key and value hold."""
    k, v, g, beta, state = make_inputs(195)
    inert = np.arange(195) % 65 >= 50
    g[:, inert] = beta[:, inert] = 0
    results = []
    for seed, scale in ((3, 1.0), (4, 1e3)):
        rng = np.random.default_rng(seed)
        for x in (k, v):
            x[:, inert] = scale * rng.normal(size=x[:, inert].shape)
        results.append(chunked((k.copy(), v.copy(), g, beta, state), 65))
    for name, x, y in zip(NAMES, *results, strict=True):
        x, y = np.asarray(x), np.asarray(y)
        if name in ("k", "v"):
            assert (x[:, inert] == 0).all() and (y[:, inert] == 0).all()
        if name == "beta":  # how a token that begins to write would matter does depend on it
            x, y = x[:, ~inert], y[:, ~inert]
        np.testing.assert_array_equal(x, y, err_msg=name)


# bfloat16 has 8 bits (4e-3). Products of rounded operands leave 2e-3 to 4e-3 in the states and in
# the gradients of k and v; those of g and beta are small differences of such products.
@pytest.mark.parametrize("operands", ["bfloat16", "high"])
@pytest.mark.parametrize("correlation", [0, 0.9])
def test_bfloat16(correlation, operands):
    assert_matches(make_inputs(195, correlation=correlation), 195, operands)


@pytest.mark.parametrize("operands", ["float32", "bfloat16"])
def test_many_blocks_of_alike_keys_stay_accurate(operands):
    inputs = make_inputs(84 * 64, batch=1, heads=1, value=8)
    inputs[2][:] *= 1e-2  # memory over many blocks
    assert_matches(inputs, 64, operands)


def test_gradients_of_the_reference_are_finite_differences():
    with jax.enable_x64(True):
        inputs = make_inputs(6, key=4, value=3)
        inputs = tuple(jnp.asarray(x, jnp.float64) for x in inputs)
        f = functools.partial(gated_delta_states, block_size=3, implementation="reference")
        check_grads(jax.jit(f), inputs, order=1, modes=["rev"], eps=1e-5, rtol=1e-8)


def test_vmap_equals_a_loop():
    trials = [make_inputs(195, seed=seed) for seed in range(3)]
    stacked = tuple(jnp.stack(x) for x in zip(*trials, strict=True))
    cotangents = jnp.stack([make_cotangent(x, 65) for x in trials])
    run = states_and_gradients(block_size=65, implementation="xla")
    mapped = jax.jit(jax.vmap(run))(stacked, cotangents)
    for i, inputs in enumerate(trials):
        expected = [np.asarray(x, np.float64) for x in chunked(inputs, 65)]
        assert_close([x[i] for x in mapped], expected, TOLERANCES["float32"], 0.1)


def test_a_scan_over_blocks_equals_one_call():
    inputs = make_inputs(195)

    @jax.jit
    def run(inputs, cotangent):
        def chained(*inputs):
            *tokens, state = inputs
            blocks = [jnp.moveaxis(x.reshape(len(x), 3, 65, *x.shape[2:]), 1, 0) for x in tokens]

            def step(state, block):
                return gated_delta_states(*block, state, block_size=65)[:, -1], state

            last, starts = jax.lax.scan(step, state, blocks)
            return jnp.moveaxis(jnp.concatenate([starts, last[None]]), 0, 1)

        states, vjp = jax.vjp(chained, *inputs)
        return (states, *vjp(cotangent))

    assert_close(run(inputs, make_cotangent(inputs, 65)), oracle(inputs, 65), TOLERANCES["float32"])


def test_the_state_starts_at_zero():
    inputs = make_inputs(8)
    f = jax.jit(functools.partial(gated_delta_states, block_size=8))
    np.testing.assert_array_equal(f(*inputs[:4]), f(*inputs[:4], np.zeros_like(inputs[4])))


def test_sharding_over_batch_and_heads_moves_nothing():
    sizes = (2, 2) if jax.device_count() >= 4 else (1, 1)
    mesh = jax.make_mesh(sizes, ("batch", "heads"), axis_types=(AxisType.Auto,) * 2)
    tokens = NamedSharding(mesh, PartitionSpec("batch", None, "heads"))
    state = NamedSharding(mesh, PartitionSpec("batch", "heads"))
    inputs = make_inputs(195)
    placed = tuple(jax.device_put(x, tokens) for x in inputs[:4])
    placed = (*placed, jax.device_put(inputs[4], state))
    cotangent = jax.device_put(make_cotangent(inputs, 65), tokens)
    run = states_and_gradients(block_size=65, implementation="xla")
    compiled = run.lower(placed, cotangent).compile()
    moves = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert not any(move in compiled.as_text() for move in moves)
    assert_close(compiled(placed, cotangent), oracle(inputs, 65), TOLERANCES["float32"])


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("wan")])
def test_named_shapes_are_those_of_the_models(name):
    """480 x 832 pixels are 30 x 52 tokens a frame; a clip has 21 latent frames."""
    shape, size = SHAPES[name], name.split("_")[0]
    cfg = getattr(ModelConfig, size)()
    frames = 1 if "framewise" in name else cfg.frames_per_block
    assert (shape.heads, shape.key_dim, shape.value_dim) == (cfg.num_heads, *[cfg.head_dim] * 2)
    assert shape.block_size == frames * 30 * 52
    assert shape.blocks == (21 // frames if name.endswith("clip") else 1)


INVALID = {
    "k has shape": {"k": jnp.zeros((1, 4, 2))},
    "k has dtype": {"k": jnp.zeros((1, 4, 2, 3), jnp.float16)},
    "v has shape": {"v": jnp.zeros((1, 5, 2, 3))},
    "v has dtype": {"v": jnp.zeros((1, 4, 2, 3), jnp.bfloat16)},
    "g has shape": {"g": jnp.zeros((1, 4, 2, 1))},
    "g has dtype": {"g": jnp.zeros((1, 4, 2), jnp.bfloat16)},
    "g reaches 0.5; must be at most 0": {"g": jnp.full((1, 4, 2), 0.5)},
    "beta has shape": {"beta": jnp.zeros((1, 4))},
    "beta has dtype": {"beta": jnp.zeros((1, 4, 2), jnp.int32)},
    "initial_state has shape": {"initial_state": jnp.zeros((1, 2, 5, 3))},
    "initial_state has dtype": {"initial_state": jnp.zeros((1, 2, 3, 5), jnp.bfloat16)},
    "block_size is 3; must divide the 4 tokens": {"block_size": 3},
    "block_size is 0": {"block_size": 0},
    "implementation is 'cuda'; must be None or one of": {"implementation": "cuda"},
    "precision is 'low'; must be one of": {"precision": "low"},
    "chunk_size is 12; must be a positive multiple of 8": {"chunk_size": 12},
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_arguments(message):
    arguments = {
        "k": jnp.zeros((1, 4, 2, 3)),
        "v": jnp.zeros((1, 4, 2, 5)),
        "g": jnp.zeros((1, 4, 2)),
        "beta": jnp.zeros((1, 4, 2)),
        "block_size": 2,
    }
    call = functools.partial(gated_delta_states, **(arguments | INVALID[message]))
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(call)
    assert "\n" not in str(error.value)


def test_a_constant_decay_is_checked_under_jit():
    k, zeros, ones = jnp.zeros((1, 4, 2, 3)), jnp.zeros((1, 4, 2)), jnp.ones((1, 4, 2))
    f = functools.partial(gated_delta_states, block_size=2)
    assert jax.eval_shape(lambda beta: f(k, k, zeros, beta), zeros).shape == (1, 3, 2, 3, 3)
    with pytest.raises(ValueError, match=r"g reaches 1\.0"):
        jax.eval_shape(lambda beta: f(k, k, ones, beta), zeros)


def abstract_inputs(time):
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in make_inputs(time)]


def test_the_choice_is_logged_once(caplog):
    api._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        for time in (8, 16, 8):
            f = functools.partial(gated_delta_states, block_size=8)
            jax.eval_shape(f, *abstract_inputs(time))
    (message,) = caplog.messages
    assert message.startswith(f"gated_delta_states: xla on {jax.default_backend()}")


def test_what_is_passed_over_is_logged_with_the_reason(caplog, monkeypatch):
    api._log_choice.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with caplog.at_level(logging.INFO, "pallas_kernels"):
        f = functools.partial(gated_delta_states, block_size=8)
        jax.eval_shape(f, *abstract_inputs(8))
    (message,) = caplog.messages
    assert message.startswith("gated_delta_states: xla on gpu; gpu needs ")


@pytest.mark.parametrize("name", sorted({"gpu", "tpu"} - {jax.default_backend()}))
def test_a_named_implementation_never_falls_back(name):
    f = functools.partial(gated_delta_states, block_size=8, implementation=name)
    with pytest.raises(NotImplementedError, match=f"^implementation '{name}' needs") as error:
        jax.eval_shape(f, *abstract_inputs(8))
    assert "\n" not in str(error.value)
