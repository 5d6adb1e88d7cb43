"""Splash attention compiled for TPUs that are not here, at the true sizes."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.attention import splash
from pallas_kernels.attention.shapes import SHAPES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu, TPUs' compiler, is not installed",
    ),
]


def gradients(q, k, v, length):
    loss = lambda q, k, v: splash.attention(q, k, v, length).astype(jnp.float32).sum()
    return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize("direction", [splash.attention, splash.attention_with_lse, gradients])
@pytest.mark.parametrize("name", ["wan1p3b_block", "wan1p3b_text", "wan1p3b_cache"])
@pytest.mark.parametrize("kind", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles(kind, name, direction, monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no host of a TPU to ask
    device = topologies.get_topology_desc(kind, platform="tpu").devices[0]
    make = lambda shape, dtype: jax.ShapeDtypeStruct(
        shape, dtype, sharding=SingleDeviceSharding(device)
    )
    shape = SHAPES[name]
    q, k, v = (
        make((shape.batch, n, shape.heads, shape.head_dim), jnp.bfloat16)
        for n in (shape.queries, shape.keys, shape.keys)
    )
    length = None if shape.filled is None else make((shape.batch,), jnp.int32)
    traced = jax.jit(direction).trace(q, k, v, length)
    traced.lower(lowering_platforms=("tpu",)).compile()
