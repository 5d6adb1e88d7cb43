"""The TPU kernels at their true shapes, compiled ahead of time for chips that need not be there.

The compiler refuses what the chip cannot do or hold in VMEM. It comes with libtpu.
"""

import importlib.util
import os

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.gated_delta import tpu
from pallas_kernels.gated_delta.plan import Plan
from pallas_kernels.gated_delta.shapes import SHAPES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
    ),
]

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

# Every shape and way of computing on some chip, the main one on all.
CASES = [
    *((chip, "wan1p3b_clip", "bfloat16", {}) for chip in CHIPS),
    *((chip, "wan1p3b_block", "bfloat16", {}) for chip in CHIPS),
    ("v5e", "wan1p3b_block", "bfloat16", {"chunk_size": 64}),
    ("v5e", "wan1p3b_block", "bfloat16", {"value_dim": 256}),
    ("v5e", "wan1p3b_block", "high", {}),
    ("v5p", "wan1p3b_block", "float32", {}),
    ("v6e", "wan1p3b_framewise_clip", "bfloat16", {}),
    ("v6e", "wan1p3b_framewise_block", "high", {}),
    ("v5p", "wan14b_clip", "bfloat16", {}),
    ("v6e", "wan14b_block", "bfloat16", {}),
]


@pytest.fixture(scope="module")
def device():
    """The first device of a slice of a chip."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
        patch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
        yield lambda chip: topologies.get_topology_desc(CHIPS[chip], "tpu").devices[0]


def lower(device, shape, operands, *, chunk_size=None, value_dim=None):
    """Forward and backward of a named shape, lowered for a device."""
    batch, time, heads, key = shape.batch, shape.time, shape.heads, shape.key_dim
    value = value_dim or shape.value_dim
    tokens = jnp.float32 if operands == "float32" else jnp.bfloat16
    operand = jnp.bfloat16 if operands == "bfloat16" else jnp.float32
    plan = Plan(shape.block_size, chunk_size, jnp.dtype(operand), jnp.dtype(jnp.float32))

    def array(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(device))

    k, v = (array(batch, time, heads, dim, dtype=tokens) for dim in (key, value))
    gates, state = array(batch, time, heads), array(batch, heads, key, value)
    dstates = array(batch, shape.blocks + 1, heads, key, value)
    inputs = (k, v, gates, gates, state)
    forward = jax.jit(lambda *inputs: tpu.forward(plan, *inputs)[0]).lower(*inputs)
    backward = jax.jit(lambda *args: tpu.backward(plan, args[:5], args[5]))
    return forward, backward.lower(*inputs, dstates)


@pytest.mark.parametrize(("chip", "shape", "operands", "options"), CASES)
def test_compiles_for(device, chip, shape, operands, options):
    for lowered in lower(device(chip), SHAPES[shape], operands, **options):
        assert "tpu_custom_call" in str(lowered.compile().as_text())
