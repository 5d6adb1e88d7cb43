"""Splitting and merging parameters loses nothing."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from arl2_jax.config import ModelConfig
from arl2_jax.models import is_added, param_shapes
from arl2_jax.training.partition import TRAINED, merge_params, split_params


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


@pytest.mark.parametrize("phase", TRAINED)
def test_merge_is_the_inverse_of_split(params, phase):
    trained, frozen = split_params(params, TRAINED[phase])
    assert not flat(trained).keys() & flat(frozen).keys()
    merged = merge_params(trained, frozen)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        assert a is b


def test_phases_train_what_the_paper_trains():
    """Counts of Wan 1.3B with 22 layers converted."""
    cfg = ModelConfig.wan1p3b(hybrid_layers=tuple(range(22)))
    shapes = param_shapes(cfg)
    count = lambda phase: sum(
        int(np.prod(leaf.shape)) for leaf in flat(split_params(shapes, TRAINED[phase])[0]).values()
    )
    # Per layer: three D x D projections a head, three C -> H gates, two numbers a head.
    assert count("stage1") == 22 * (3 * 12 * 128 * 128 + 3 * 1536 * 12 + 2 * 12)
    assert count("stage2") == 24_826_384
    assert count("teacher") == 1_418_996_800 + 24_826_384


def test_empty_sides():
    tree = {"blocks": {"0": {"w": 1}}}
    assert split_params(tree, is_added) == ({}, tree)
    assert merge_params({}, tree) == tree == merge_params(tree, {})
