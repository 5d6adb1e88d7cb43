"""The two forms of parameters hold the same, and neither is made where it is not needed."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax import models, sharding
from arl2_jax.config import MeshConfig, to_config_dict
from arl2_jax.weights.folder import save_params
from arl2_jax.weights.load import load_params


@pytest.fixture(scope="module")
def gaps(cfg):
    """Three runs, of which the last has one layer."""
    return dataclasses.replace(cfg, num_layers=4, hybrid_layers=(0, 1, 3))


def test_stacking_and_unstacking_undo_each_other(gaps, make_params):
    params = make_params(gaps)
    stacked = models.stack_params(params, gaps)
    assert models.runs_of(stacked) == [(0, 2), (2, 3), (3, 4)]
    assert set(stacked["blocks"]) == {"0-1", "2-2", "3-3"}
    chex.assert_trees_all_equal(models.unstack_params(stacked), params)
    assert models.stack_params(stacked, gaps) is stacked
    for i in range(4):
        chex.assert_trees_all_equal(models.layer_of(stacked, i), models.layer_of(params, i))


def test_a_part_of_the_parameters_is_stacked_too(gaps, make_params):
    params = make_params(gaps)
    added = {"blocks": {i: {"delta": params["blocks"][i]["delta"]} for i in "013"}}
    stacked = models.stack_params(added, gaps)
    assert models.runs_of(stacked) == [(0, 2), (3, 4)]
    chex.assert_trees_all_equal(models.unstack_params(stacked), added)


def test_more_than_nine_layers_keep_their_order(cfg, make_params):
    deep = dataclasses.replace(cfg, num_layers=12, hybrid_layers=(1, 9, 10))
    stacked = models.stack_params(make_params(deep), deep)
    assert models.runs_of(stacked) == [(0, 1), (1, 2), (2, 9), (9, 11), (11, 12)]


def test_layers_with_different_memories_are_not_taken_for_one_run(gaps, make_params):
    stacked = models.stack_params(make_params(gaps), gaps)
    models.stack_params(stacked, gaps.teacher())  # each run is a part of its only one
    other = models.stack_params(make_params(gaps.teacher()), gaps.teacher())
    with pytest.raises(ValueError, match="layers 0-3 are stacked, but have different memories"):
        models.stack_params(other, gaps)


def test_a_teacher_runs_in_the_stacks_of_its_student(gaps, make_params, make_clip, apply_clip):
    params = models.without_delta(make_params(gaps))
    clip = make_clip(gaps)
    found, _ = apply_clip(models.stack_params(params, gaps), gaps.teacher(), *clip)
    expected, _ = apply_clip(params, gaps.teacher(), *clip)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # other programs


def test_additions_stay_float32(gaps, make_params):
    half = dataclasses.replace(gaps, dtype="bfloat16")
    params = models.cast_backbone(make_params(half), half)
    kernel = params["blocks"]["0"]["self_attn"]["q"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(params["blocks"]["0"]["delta"])} == {
        jnp.dtype("float32")
    }
    again = models.compute_params(params, half)
    wanted = models.compute_params(make_params(half), half)
    chex.assert_trees_all_equal(again, wanted)
    added = again["blocks"]["0-1"]["delta"]
    assert added["phi_q"].dtype == jnp.bfloat16 and added["A_log"].dtype == jnp.float32


def test_weights_are_read_as_training_holds_them(gaps, make_params, tmp_path):
    half = dataclasses.replace(gaps, dtype="bfloat16")
    params = make_params(half)
    save_params(tmp_path / "weights", params, to_config_dict(half))
    found = load_params(tmp_path / "weights", half, precision="training")
    chex.assert_trees_all_equal(found, models.cast_backbone(params, half))


def test_no_device_makes_a_whole_matrix(cfg):
    """At billions of parameters, the initial ones may not fit on one."""
    wide = dataclasses.replace(cfg, ffn_dim=64, num_layers=8, hybrid_layers=(0, 1, 2, 3))
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    make = lambda key: models.init_stacked(wide, key)
    params = sharding.jit_on(mesh, make)(jax.random.key(0))
    kernel = params["blocks"]["0-3"]["ffn"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 8, 32)
    layout = sharding.tree_shardings(jax.eval_shape(make, jax.random.key(0)), mesh)
    program = jax.jit(make, out_shardings=layout).lower(jax.random.key(0)).compile().as_text()
    assert not re.search(r"[a-z]+\d+\[4,(32,64|64,32)\]", program)
    alone = models.stack_params(models.init_params(wide, jax.random.key(0)), wide)
    chex.assert_trees_all_close(params, alone, rtol=1e-6)  # roots and products in other programs
