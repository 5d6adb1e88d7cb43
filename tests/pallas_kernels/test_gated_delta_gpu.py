"""The kernels for NVIDIA Hopper without a GPU: lowered for CUDA, and run by the interpreter."""

import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from recurrence_cases import (
    CASES,
    TOLERANCES,
    assert_close,
    in_bfloat16,
    make_cotangent,
    make_inputs,
    oracle,
)

from pallas_kernels.gated_delta import gpu
from pallas_kernels.gated_delta.api import states_by
from pallas_kernels.gated_delta.gpu import segments
from pallas_kernels.gated_delta.plan import Plan
from pallas_kernels.gated_delta.shapes import SHAPES

BFLOAT16, FLOAT32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
SIZES = {"batch": 1, "heads": 1, "key": 128, "value": 128}

# What cases of identical keys miss (pallas_kernels/README.md, known limits). With beta = 1 every
# token overwrites all before it, and the gradient of g is what rounding leaves; where it is 0,
# assert_close divides by 1e-3 of that of beta. With beta = 1.999 and no decay the gradient of beta
# is a small difference of what all tokens of a chunk wrote: (I + L)^-1 is kept in float16.
MISSED = {
    "identical keys, beta 1, g -1": {"g": 0.6},
    "identical keys, beta 1, reset": {"g": 6e-2},
    "identical keys, beta 1.999, g 0": {"beta": 6e-2},
    "identical keys, beta 1.999, g -0.0001": {"beta": 6e-2},
}

needs_interpreter = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="Pallas's interpreter for GPUs needs jax 0.11"
)


def states_and_gradients(plan):
    @jax.jit
    def run(inputs, cotangent):
        states, vjp = jax.vjp(functools.partial(states_by, "gpu", plan), *inputs)
        return (states, *vjp(cotangent))

    return run


def interpreter_plan(block_size):
    return Plan(block_size, None, BFLOAT16, FLOAT32, plgpu.InterpretGPUParams(detect_races=True))


@functools.cache
def interpreted(block_size):
    return states_and_gradients(interpreter_plan(block_size))


@functools.cache
def interpreted_forward(block_size):
    return jax.jit(functools.partial(states_by, "gpu", interpreter_plan(block_size)))


def check(inputs, block_size, tolerances=TOLERANCES["bfloat16"]):
    """States, with and without a backward pass, and five gradients against float64."""
    inputs = in_bfloat16(inputs)
    results = interpreted(block_size)(inputs, make_cotangent(inputs, block_size))
    expected = oracle(inputs, block_size)
    assert_close(results, expected, tolerances)
    assert [x.dtype for x in results[1:]] == [x.dtype for x in inputs]
    states = interpreted_forward(block_size)(*inputs)
    assert_close((states, *expected[1:]), expected, tolerances)


def lower(shape, value_dim=None):
    """Lowers the forward and the backward pass for CUDA, from shapes alone."""
    value_dim = value_dim or shape.value_dim
    struct = lambda *sizes, dtype=FLOAT32: jax.ShapeDtypeStruct(sizes, dtype)
    tokens = (shape.batch, shape.time, shape.heads)
    state = (shape.heads, shape.key_dim, value_dim)
    inputs = (
        struct(*tokens, shape.key_dim, dtype=BFLOAT16),
        struct(*tokens, value_dim, dtype=BFLOAT16),
        struct(*tokens),
        struct(*tokens),
        struct(shape.batch, *state),
    )
    cotangent = struct(shape.batch, shape.blocks + 1, *state)
    run = states_and_gradients(Plan(shape.block_size, None, BFLOAT16, FLOAT32))
    return run.trace(inputs, cotangent).lower(lowering_platforms=("cuda",)).as_text()


def test_lowers_for_cuda_at_the_true_size():
    text = lower(SHAPES["wan1p3b_clip"])
    for name in ("solve", "maps", "fold", "fold_back", "chunk_states", "gradients"):
        assert f"gated_delta_{name}" in text, name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith("wan")])
def test_lowers_for_cuda_at_all_true_sizes(name):
    lower(SHAPES[name])


@pytest.mark.slow
@pytest.mark.parametrize("value_dim", [64, 192, 256, 512])
def test_lowers_for_cuda_at_other_widths_of_values(value_dim):
    lower(SHAPES["wan1p3b_block"], value_dim)


@pytest.mark.parametrize(
    "jobs", [[(7, 1)], [(5, 264), (3, 200)], [(50, 336), (24, 336)], [(1, 999)]]
)
def test_time_of_programs_in_turn(jobs):
    """Against programs that each take the next job when they are free."""
    free = [0] * 264
    for length, number in jobs:
        for _ in range(number):
            heapq.heapreplace(free, free[0] + length)
    assert segments.makespan(jobs, 264) == max(free)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("chunks", [1, 2, 74, 129, 20_000])
def test_segments_cover_a_block(chunks, backward):
    tokens = jax.ShapeDtypeStruct((2, 64 * chunks - 5, 12, 128), BFLOAT16)
    lengths = segments.plan_segments(tokens, tokens, 1, backward=backward).lengths
    assert sum(lengths) == chunks
    assert min(lengths) == lengths[-1] > 0
    assert len(set(lengths[:-1])) <= 1


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize("case", CASES)
def test_matches_the_recurrence(case):
    tolerances = TOLERANCES["bfloat16"] | MISSED.get(case, {})
    check(make_inputs(130, **SIZES, **CASES[case]), 65, tolerances)


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize("block_size", [1, 63, 64, 129])
def test_odd_lengths(block_size):
    check(make_inputs(2 * block_size, **SIZES), block_size)


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize(("key", "value"), [(64, 64), (64, 128), (128, 64), (128, 256)])
def test_widths(key, value):
    check(make_inputs(72, batch=2, heads=2, key=key, value=value), 72)


@pytest.fixture(params=[1, 2, 5])
def chunks_of_a_segment(request, monkeypatch):
    """Chunks of a segment, for blocks of five: more than are in shared memory, or fewer."""
    each = request.param
    plan = lambda *xs, **options: segments.plan_segments(*xs, **options)._replace(each=each)
    monkeypatch.setattr(gpu, "plan_segments", plan)
    for cache in (interpreted, interpreted_forward):
        cache.cache_clear()
    yield
    for cache in (interpreted, interpreted_forward):
        cache.cache_clear()


@pytest.mark.slow
@needs_interpreter
def test_segments(chunks_of_a_segment):
    check(make_inputs(2 * 264, **SIZES | {"batch": 2}), 264)


@pytest.mark.slow
@needs_interpreter
def test_cotangents_that_fade_out():
    """In the first of five chunks the cotangent is a denormal number, or zero."""
    check(make_inputs(320, **SIZES, g=-0.35), 320)


@pytest.mark.slow
@needs_interpreter
def test_many_chunks_that_undo_each_other():
    """Identical keys, beta near 2, no decay: each token reverses what is there.

    Rounding errors of Y, in float16, add up for good, to 1.7e-2 after 700 tokens; in the gradient
    of beta those of the inverse too, to 3.1e-2.
    """
    missed = dict.fromkeys(("states", "k", "v"), 2e-2) | {"beta": 4e-2}
    inputs = make_inputs(700, **SIZES, correlation=1, beta=1.999, g=0)
    check(inputs, 700, TOLERANCES["bfloat16"] | missed)


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize("sizes", [(1e-6, 1e6), (1e6, 1e-6), (0, 1e6), (1e-30, 1e-30)])
def test_values_of_any_size(sizes):
    """The scales of float16 operands follow the values from chunk to chunk."""
    k, v, g, beta, state = make_inputs(256, **SIZES)
    v[:, :128] *= sizes[0]
    v[:, 128:] *= sizes[1]
    check((k, v, g, beta, state * sizes[0]), 256)


@pytest.mark.slow
@needs_interpreter
def test_weak_writing():
    """States that are small beside the values: what is written is scaled to float16 with beta."""
    k, v, g, beta, state = make_inputs(260, **SIZES)
    check((k, v, g, 1e-7 * beta, 0 * state), 130)


@pytest.mark.slow
@needs_interpreter
@pytest.mark.parametrize("length", [1e-3, 1e4])
def test_keys_of_other_lengths(length):
    """As far from unit length as the public function allows."""
    k, v, g, beta, state = make_inputs(130, **SIZES)
    check((length * k, v, g, beta / max(1, length**2), state), 65)


@pytest.mark.slow
@needs_interpreter
def test_many_blocks_stay_accurate():
    k, v, g, beta, state = make_inputs(84 * 8, **SIZES | {"value": 64})
    g = g * 1e-2  # memory over many blocks
    inputs = in_bfloat16((k, v, g, beta, state))
    plan = Plan(8, None, BFLOAT16, FLOAT32, plgpu.InterpretGPUParams())
    states = jax.jit(functools.partial(states_by, "gpu", plan))(*inputs)
    expected = oracle(inputs, 8)[0]
    assert np.linalg.norm(states - expected) <= 1e-2 * np.linalg.norm(expected)


UNSUPPORTED = {
    "needs bfloat16 keys; k has float32": {"dtype": jnp.float32},
    "has no precision 'high'": {"operand": FLOAT32},
    "needs chunk_size 64; got 128": {"chunk_size": 128},
    "needs 64 or 128 features a key; k has 32": {"key": 32},
    "needs a multiple of 64 features a value; v has 96": {"value": 96},
    "needs at most 512 features a value; v has 576": {"value": 576},
}


@pytest.mark.parametrize("message", UNSUPPORTED)
def test_unsupported_reasons(message):
    case = {"dtype": BFLOAT16, "operand": BFLOAT16, "chunk_size": None, "key": 128, "value": 128}
    case |= UNSUPPORTED[message]
    k, v = (jnp.zeros((1, 8, 1, case[name]), case["dtype"]) for name in ("key", "value"))
    plan = Plan(8, case["chunk_size"], case["operand"], FLOAT32, interpret=True)
    assert gpu.unsupported_reason(plan, k, v) == message


def test_needs_a_hopper_gpu():
    k = jnp.zeros((1, 8, 1, 128), BFLOAT16)
    message = gpu.unsupported_reason(Plan(8, None, BFLOAT16, FLOAT32), k, k)
    assert message is not None and message.startswith("needs an NVIDIA Hopper GPU; the device is")
