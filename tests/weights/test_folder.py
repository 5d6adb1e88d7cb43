"""Folders of final weights: whole or not there."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_line import assert_one_line

from arl2_jax.errors import StorageError, WeightsError
from arl2_jax.weights.folder import load_params_folder, save_params


def test_weights_come_back_with_their_config(tmp_path):
    weights = jax.random.normal(jax.random.key(0), (16, 8))
    params = {"blocks": {"0": {"q": {"kernel": weights, "bias": jnp.zeros(8)}}}}
    for value in (1.0, 2.0):  # the second replaces the first
        params["half"] = jnp.full(5, value, jnp.bfloat16)
        save_params(tmp_path / "weights", params, {"dim": 128, "hybrid_layers": (0, 2)})
    found, config = load_params_folder(tmp_path / "weights")
    assert config == {"dim": 128, "hybrid_layers": [0, 2]}
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(found))
    chex.assert_trees_all_equal(found, params, strict=True)


def test_an_interrupted_export_leaves_the_earlier_weights(tmp_path, monkeypatch):
    save_params(tmp_path / "weights", {"w": jnp.ones(2)}, {"dim": 1})
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", lambda *_, **__: 1 / 0)
        with pytest.raises(StorageError):
            save_params(tmp_path / "weights", {"w": jnp.zeros(2)}, {"dim": 2})
    assert load_params_folder(tmp_path / "weights")[1] == {"dim": 1}
    save_params(tmp_path / "weights", {"w": jnp.zeros(2)}, {"dim": 2})
    assert load_params_folder(tmp_path / "weights")[1] == {"dim": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["weights"]


def test_weights_that_are_missing_or_damaged_are_one_line(tmp_path):
    folder = tmp_path / "weights"
    with pytest.raises(WeightsError, match=r"config\.json is missing") as error:
        load_params_folder(folder)
    assert_one_line(error, folder)
    save_params(folder, {"w": jnp.ones(300)}, {})
    for file in (folder / "params" / "d").iterdir():
        file.write_bytes(b"")
    with pytest.raises(WeightsError, match="cannot be read") as error:
        load_params_folder(folder)
    assert_one_line(error, folder)
