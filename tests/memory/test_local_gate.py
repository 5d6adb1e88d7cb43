"""The local control: what is trained acts on the softmax inside the block, and nothing is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax import models


@pytest.fixture(scope="module")
def local(cfg):
    return dataclasses.replace(cfg, memory_gate="local", hybrid_layers=(0, 1, 2))


def test_clip_form_is_block_form(local, make_params, clip, apply_clip, block_by_block, error):
    params = make_params(local)
    flow, diagnostics = apply_clip(params, local, *clip)
    wanted, memory = block_by_block(params, local, clip)
    # float32 rounding over three layers.
    assert error(flow, wanted) < 1e-5
    assert not jax.tree.leaves(diagnostics) and not any(map(np.any, jax.tree.leaves(memory)))


def test_at_its_start_it_is_the_control_with_a_closed_gate(local, clip, apply_clip, error):
    """Low-rank updates are zero and projections the identity then."""
    params = models.init_params(local, jax.random.key(0))
    head = params["head"]["linear"]
    head["kernel"] = jax.random.normal(jax.random.key(1), head["kernel"].shape)
    flow = apply_clip(params, local, *clip)[0]
    wanted = apply_clip(params, dataclasses.replace(local, memory_gate="zero"), *clip)[0]
    assert error(flow, wanted) < 1e-6


def test_blocks_know_nothing_of_each_other(local, make_params, clip, apply_clip):
    params = make_params(local)
    flow = apply_clip(params, local, *clip)[0]
    other = apply_clip(params, local, clip.clean + 1, *clip[1:])[0]
    np.testing.assert_array_equal(flow, other)


def test_it_trains_what_the_memory_branch_reads_and_writes_with(local, make_params, clip):
    """Low-rank updates and projections of q, k and v have gradients; gates of the state do not."""
    loss = lambda params: jnp.mean(models.apply_clip(params, local, *clip)[0] ** 2)
    gradient = jax.jit(jax.grad(loss))(make_params(local))["blocks"]["0"]["delta"]
    moved = {name for name, node in gradient.items() if any(map(np.any, jax.tree.leaves(node)))}
    both = {f"{kind}_{x}" for kind in ("lora", "phi") for x in "qkv"}
    assert moved == both | {"lora_fc1", "lora_fc2"}
