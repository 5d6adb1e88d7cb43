"""Sizes of the released models, and initial values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from arl2_jax import models
from arl2_jax.config import ModelConfig


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def test_sizes_of_wan1p3b():
    cfg = ModelConfig.wan1p3b(hybrid_layers=tuple(range(22)))
    shapes = models.param_shapes(cfg)
    assert count(models.without_delta(shapes)) == 1_418_996_800
    assert count(shapes) - 1_418_996_800 == 24_826_384
    assert {count(shapes["blocks"][str(i)]["delta"]) for i in range(22)} == {1_128_472}
    assert all("delta" not in shapes["blocks"][str(i)] for i in range(22, 30))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


def test_wan14b_has_the_shapes_of_its_release():
    shapes = flat(models.param_shapes(ModelConfig.wan14b()))
    assert 14.2e9 < sum(int(np.prod(leaf.shape)) for leaf in shapes.values()) < 14.4e9
    assert shapes["blocks/39/ffn/fc1/kernel"].shape == (5120, 13824)


@pytest.fixture(scope="module")
def initial(cfg):
    return models.init_params(cfg, jax.random.key(3))


def test_teacher_does_not_depend_on_what_is_hybrid(cfg, initial):
    other = models.init_params(dataclasses.replace(cfg, hybrid_layers=(2,)), jax.random.key(3))
    one, two = flat(models.without_delta(initial)), flat(models.without_delta(other))
    assert one.keys() == two.keys() == flat(models.param_shapes(cfg.teacher())).keys()
    for path in one:
        np.testing.assert_array_equal(one[path], two[path], err_msg=path)


def test_no_two_layers_or_projections_start_alike(initial):
    kernels = [leaf for path, leaf in flat(initial).items() if path.endswith("q/kernel")]
    kernels += [leaf for path, leaf in flat(initial).items() if path.endswith("k/kernel")]
    sums = {float(jnp.sum(kernel)) for kernel in kernels}
    assert len(sums) == len(kernels) == 12
    assert len({float(initial["blocks"][i]["delta"]["A_log"][0]) for i in "01"}) == 2


def test_untrained_network_predicts_nothing(cfg, initial, clip, apply_clip):
    flow, _ = apply_clip(initial, cfg, *clip)
    assert not np.any(flow)


def test_initial_values(initial):
    found = flat(initial)
    for path, leaf in found.items():
        name = path.rsplit("/", 1)[-1]
        if name in ("bias",) or ("/lora_" in path and name == "b") or path == "head/linear/kernel":
            assert not np.any(leaf), path
        elif name == "scale":
            np.testing.assert_array_equal(leaf, 1, err_msg=path)
        else:
            assert np.any(leaf), path
    assert initial["blocks"]["0"]["modulation"].shape == (6, 32)
    np.testing.assert_array_equal(initial["blocks"]["1"]["delta"]["phi_v"][1], np.eye(16))


def test_other_keys_give_other_parameters(cfg, initial):
    other = models.init_params(cfg, jax.random.key(4))
    assert np.any(other["patch_embedding"]["kernel"] != initial["patch_embedding"]["kernel"])
