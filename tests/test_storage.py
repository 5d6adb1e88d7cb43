"""Folders that cannot be used are refused in one line; JSON holds what it knows."""

import jax.numpy as jnp
import numpy as np
import pytest
from one_line import assert_one_line

from arl2_jax.errors import StorageError
from arl2_jax.json_trees import plain_json
from arl2_jax.storage import check_writable
from arl2_jax.training.checkpoint import Checkpointer
from arl2_jax.weights.folder import save_params


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    open_folder = lambda f: Checkpointer(f, keep=2, fingerprint={})
    for call in (check_writable, open_folder, lambda f: save_params(f, {"w": jnp.ones(2)}, {})):
        with pytest.raises(StorageError) as error:
            call(tmp_path / "file" / "folder")
        assert_one_line(error, tmp_path / "file")


def test_a_disk_that_is_too_small_is_one_line(tmp_path):
    check_writable(tmp_path / "new", size=10)
    with pytest.raises(StorageError, match="GiB free") as error:
        check_writable(tmp_path, size=1 << 60)
    assert_one_line(error, tmp_path)


def test_numbers_that_are_not_finite_become_null():
    tree = {"a": float("nan"), "b": (np.float32(1.5), np.inf), "c": np.arange(2), "d": None}
    assert plain_json(tree) == {"a": None, "b": [1.5, None], "c": [0, 1], "d": None}
