"""The module computes what the functions do, and its layers can be exchanged."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from arl2_jax import models
from arl2_jax.config import MemorySpec, WindowConfig
from arl2_jax.memory import Window
from arl2_jax.models.transformer import WanTransformer


@pytest.fixture(scope="module")
def model(cfg, params):
    return WanTransformer.from_params(cfg, params)


def by_module(model, clip):
    """Flows block by block, as the fixture `block_by_block` has them of the functions."""
    f, (batch, frames, *_) = model.cfg.frames_per_block, clip.clean.shape
    graph, state = nnx.split(model)

    @jax.jit
    def block(state, memory, clean, noisy, timestep, position):
        model = nnx.merge(graph, state)
        now = dict(memory=memory, position=position)
        flow, _ = model.block(noisy, timestep, clip.text, **now)
        return flow, model.block(clean, 0 * timestep, clip.text, **now, write=True)[1]

    memory, flows = model.init_memory(batch=batch, frames=frames, tokens_per_frame=6), []
    for first in range(0, frames, f):
        part = (x[:, first : first + f] for x in clip[:3])
        flow, memory = block(state, memory, *part, jnp.int32(first))
        flows.append(flow)
    return jnp.concatenate(flows, axis=1)


def test_both_forms_are_those_of_the_functions(model, cfg, params, clip, apply_clip, error):
    wanted, _ = apply_clip(params, cfg, *clip)
    graph, state = nnx.split(model)
    flow, logged = jax.jit(lambda state: nnx.merge(graph, state).clip(*clip))(state)
    assert error(flow, wanted) < 2e-5  # as in test_forms
    assert error(by_module(model, clip), wanted) < 2e-5
    assert [bool(found) for found in logged] == [True, True, False]


def test_parameters_go_in_and_come_out(model, params):
    chex.assert_trees_all_equal(model.to_params(), params)


def test_fresh_module_has_the_parameters_of_the_config(cfg):
    made = jax.eval_shape(lambda: WanTransformer(cfg, rngs=nnx.Rngs(0)).to_params())
    shapes = models.param_shapes(cfg)
    chex.assert_trees_all_equal_shapes(made, shapes)


def test_a_layer_takes_another_memory(cfg, params, clip, block_by_block, error):
    settings = WindowConfig(sink=0, frames=2)
    model = WanTransformer.from_params(cfg, params)
    full = by_module(model, clip)
    model.layers[2].memory = Window(settings, cfg.attention, rngs=nnx.Rngs(0))
    changed = dataclasses.replace(cfg, memories=(MemorySpec("window", settings, (2,)),))
    assert error(by_module(model, clip), block_by_block(params, changed, clip)[0]) < 2e-5
    assert error(by_module(model, clip), full) > 1e-4
