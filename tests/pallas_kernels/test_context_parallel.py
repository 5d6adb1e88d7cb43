"""The recurrence over tokens split over devices is the recurrence."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from recurrence_cases import (
    CASES,
    TOLERANCES,
    assert_close,
    in_bfloat16,
    make_cotangent,
    make_inputs,
    oracle,
    undamped,
)

from pallas_kernels.gated_delta import context_parallel

TOKENS = PartitionSpec(None, "context")
# How much further than TOLERANCES rounding errors may add up where nothing damps them.
UNDAMPED = {"float32": 2, "bfloat16": 1}
# Devices, blocks, tokens of a block. The exchange moves as much for any of them.
SPLITS = {
    "one device": (1, 3, 24),
    "a block each": (2, 2, 65),
    "two blocks each": (4, 8, 8),
    "blocks that span two devices": (2, 7, 24),
    "blocks that span three devices": (8, 7, 24),
    "one block over all": (8, 1, 64),
}


def over_devices(devices, block_size, *, check_vma=True, **options):
    """The function on global arrays; the states of devices stand one after the other."""
    auto, few = (AxisType.Auto,), jax.devices()[:devices]
    mesh = jax.make_mesh((devices,), ("context",), axis_types=auto, devices=few)
    own = functools.partial(
        context_parallel.gated_delta_states, axis_name="context", block_size=block_size, **options
    )

    def states(*inputs):
        specs = ((TOKENS,) * 4 + (PartitionSpec(),))[: len(inputs)]
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=TOKENS, check_vma=check_vma)(
            *inputs
        )

    return states


@functools.cache
def compiled(devices, blocks, block_size, dtype, **options):
    """Compiled (inputs, cotangent) -> (states, five gradients)."""
    function = over_devices(devices, block_size, **options)
    inputs = make_inputs(blocks * block_size)
    inputs = in_bfloat16(inputs) if dtype == "bfloat16" else inputs

    def run(inputs, cotangent):
        states, vjp = jax.vjp(function, *inputs)
        return (states, *vjp(cotangent))

    cotangent = jax.eval_shape(function, *inputs)
    return jax.jit(run).lower(inputs, cotangent).compile()


def boundaries(devices, blocks, block_size):
    """Which boundary of blocks each state of each device stands at; -1 is none."""
    tokens = blocks * block_size // devices
    own = [
        range(i * tokens // block_size, -(-(i + 1) * tokens // block_size)) for i in range(devices)
    ]
    width = max(map(len, own))
    ends = [(i + 1) * tokens for i in range(devices)]
    end = lambda i: -1 if ends[i] % block_size else ends[i] // block_size
    return np.array([[*own[i], *[end(i)] * (width + 1 - len(own[i]))] for i in range(devices)])


def assert_is_one_device(inputs, split, dtype="float32", factor=1, **options):
    _, blocks, block_size = split
    if dtype == "bfloat16":
        inputs = in_bfloat16(inputs)
    places = boundaries(*split).ravel()
    # Every copy of a state has a share of its cotangent.
    shares = np.random.default_rng(2).uniform(size=len(places)) * (places >= 0)
    sums = np.bincount(places[places >= 0], shares[places >= 0])
    shares /= np.where(places >= 0, sums[places], 1)
    cotangent = make_cotangent(inputs, block_size)[:, places] * shares[:, None, None, None]

    states, *gradients = compiled(*split, dtype, **options)(inputs, cotangent.astype(np.float32))
    expected = oracle(inputs, block_size)
    assert set(places) - {-1} == set(range(blocks + 1))
    copies = np.where((places >= 0)[:, None, None, None], states, 0)
    wanted = np.where((places >= 0)[:, None, None, None], expected[0][:, places], 0)
    assert_close((copies, *gradients), (wanted, *expected[1:]), TOLERANCES[dtype], factor)
    assert [x.dtype for x in gradients] == [x.dtype for x in inputs]
    return states


@pytest.mark.parametrize("split", SPLITS)
def test_devices_are_one(split):
    _, blocks, block_size = SPLITS[split]
    inputs = make_inputs(blocks * block_size, reset=True)
    states = assert_is_one_device(inputs, SPLITS[split])
    # float32 sums of states of size 1 over all tokens
    np.testing.assert_allclose(states[:, -1], oracle(inputs, block_size)[0][:, -1], atol=1e-5)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("identical")])
def test_any_beta_and_decay(case):
    inputs = make_inputs(168, **CASES[case])
    factor = UNDAMPED["float32"] if undamped(case) else 1
    assert_is_one_device(inputs, (8, 7, 24), factor=factor)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_any_keys_beta_and_decay(case, dtype):
    factor = UNDAMPED[dtype] if undamped(case) else 1
    assert_is_one_device(make_inputs(168, **CASES[case]), (8, 7, 24), dtype, factor)


def test_bfloat16():
    assert_is_one_device(make_inputs(64), (4, 8, 8), "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize(("blocks", "block_size"), [(1, 1560), (7, 120), (8, 65), (3, 40)])
def test_any_split(devices, blocks, block_size, dtype):
    assert_is_one_device(make_inputs(blocks * block_size), (devices, blocks, block_size), dtype)


@pytest.mark.parametrize("token", [0, 20, 21, 100, 167])
def test_a_reset_forgets_exactly(token):
    """On its own device and on all that follow, whatever stood before it."""
    after = boundaries(8, 7, 24).ravel() * 24 > token
    cotangent = np.ones((2, len(after), 2, 16, 24), np.float32)
    runs = []
    for seed in (0, 5):
        inputs = make_inputs(168, seed=seed)
        for x, y in zip(inputs[:4], make_inputs(168)[:4], strict=True):
            x[:, token:] = y[:, token:]
        inputs[2][:, token] = -1e4
        runs.append(compiled(8, 7, 24, "float32")(inputs, cotangent))
    np.testing.assert_array_equal(*(states[:, after] for states, *_ in runs))
    assert all(np.isfinite(x).all() for x in runs[0])


@pytest.mark.parametrize("split", ["two blocks each", "one block over all"])
def test_two_matrices_a_head_move_whatever_the_tokens(split):
    devices, _, _ = SPLITS[split]
    hlo = compiled(*SPLITS[split], "float32").as_text()
    moved = re.findall(r"= (\S+) (all-\S+?|collective-\S+?|reduce-scatter\S*?)\(", hlo)
    shapes = [re.match(r"f32\[([\d,]+)\]", shape)[1] for shape, name in moved if "permute" in name]
    matrices = {"2,2,16,16": "A", "2,2,16,24": "B"}  # B, H, K, K or V
    kinds = [matrices[shape] for shape in shapes]
    # To the next device, and then twice as far in every round; the last one needs no A. Once for
    # the states and once for their cotangents.
    rounds = 1 + math.ceil(math.log2(devices - 1))
    assert kinds.count("B") <= 2 * rounds and kinds.count("A") <= 2 * (rounds - 1)
    # The gradient of the initial state, which is the first device's, becomes known to all.
    others = [(shape, name) for shape, name in moved if "permute" not in name]
    assert all(name == "all-reduce" and "2,2,16,24" in shape for shape, name in others)


def test_without_the_check_of_varying_axes():
    assert_is_one_device(make_inputs(64), (4, 8, 8), check_vma=False)


def test_no_initial_state_is_zeros():
    *inputs, state = make_inputs(48)
    states = jax.jit(over_devices(2, 24))
    np.testing.assert_array_equal(states(*inputs), states(*inputs, 0 * state))


@pytest.mark.slow
def test_blocks_are_padded_with_identity_tokens():
    *tokens, state = make_inputs(15)
    pad = lambda x: np.pad(
        x.reshape(2, 3, 5, *x.shape[2:]), [(0, 0)] * 2 + [(0, 1)] + [(0, 0)] * (x.ndim - 2)
    )
    padded = [pad(x).reshape(2, 18, *x.shape[2:]) for x in tokens]
    places = boundaries(2, 3, 6).ravel()
    states = jax.jit(over_devices(2, 6))(*padded, state)
    wanted = oracle((*tokens, state), 5)[0]
    # float32, as above
    np.testing.assert_allclose(states[:, places >= 0], wanted[:, places[places >= 0]], atol=1e-5)


INVALID = {
    "g has shape": {"g": jnp.zeros((1, 8, 2, 1))},
    "v has dtype": {"v": jnp.zeros((1, 8, 2, 5), jnp.bfloat16)},
    "initial_state has shape": {"initial_state": jnp.zeros((1, 2, 1, 1))},
    "block_size is 3; must divide the 8 tokens of k on the 4 devices": {"block_size": 3},
    "block_size is 0": {"block_size": 0},
    "precision is 'low'": {"precision": "low"},
    "implementation is 'cuda'": {"implementation": "cuda"},
}


@pytest.mark.parametrize("message", INVALID)
def test_invalid_arguments(message):
    arrays = {
        "k": jnp.zeros((1, 8, 2, 3)),
        "v": jnp.zeros((1, 8, 2, 5)),
        "g": jnp.zeros((1, 8, 2)),
        "beta": jnp.zeros((1, 8, 2)),
        "initial_state": jnp.zeros((1, 2, 3, 5)),
    }
    options = {"block_size": 4} | {k: x for k, x in INVALID[message].items() if k not in arrays}
    arrays |= {k: x for k, x in INVALID[message].items() if k in arrays}
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(over_devices(4, **options), *arrays.values())
    assert "\n" not in str(error.value)


def test_a_named_implementation_never_falls_back():
    inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in make_inputs(64)]
    missing = "tpu" if jax.default_backend() != "tpu" else "gpu"
    with pytest.raises(NotImplementedError, match=f"implementation '{missing}'"):
        jax.eval_shape(over_devices(4, 8, implementation=missing), *inputs)
