"""Folders of final weights: written by a finished phase, read by `load_params`."""

import functools
import json
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import traverse_util

from arl2_jax.errors import StorageError, WeightsError
from arl2_jax.json_trees import as_json
from arl2_jax.processes import sync
from arl2_jax.storage import absolute, is_remote, reason
from arl2_jax.weights.orbax_log import quiet_orbax

_WEIGHTS = "params"
_CONFIG = "config.json"


def save_params(
    folder: epath.PathLike, params: Mapping[str, Any], model_config: Mapping[str, Any]
) -> None:
    """Write final weights atomically: an Orbax folder `params` and `config.json`.

    Args:
      folder: destination; weights that are already there are replaced.
      params: nested dict, with string keys, of arrays.
      model_config: fields of the model, as JSON.

    Raises:
      StorageError: if the folder cannot be written.
    """
    target = absolute(folder)
    # Remote stores cannot rename a folder; there config.json comes last and marks the end.
    place = target if is_remote(target) else target.parent / f".{target.name}.unfinished"
    try:
        if jax.process_index() == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            (place / _CONFIG).unlink(missing_ok=True)
            if place != target and place.exists():
                place.rmtree()
        sync("arl2_save_params")
        with _checkpointer() as checkpointer:
            checkpointer.save(place / _WEIGHTS, args=ocp.args.PyTreeSave(params), force=True)
        if jax.process_index() == 0:
            (place / _CONFIG).write_text(json.dumps(as_json(model_config), indent=2) + "\n")
            if place != target:
                replace_folder(place, target)
        sync("arl2_save_params")
    except Exception as error:
        raise StorageError(
            f"could not write weights to {target}: {reason(error)}",
            remedy="free space there or name another folder",
        ) from None


def load_params_folder(
    folder: epath.PathLike,
    *,
    dtypes: Mapping[str, Any] | None = None,
    shardings: Mapping[str, Any] | None = None,
    paths: Collection[str] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a folder written by `save_params`.

    Args:
      folder: the folder.
      dtypes: by path ("blocks/0/ffn/fc1/kernel"), to cast to; by default as they were saved.
      shardings: by path; every device then gets its slice.
      paths: the parameters to read; by default all.

    Returns:
      (params, model_config): a nested dict of arrays, numpy's unless shardings are given, and the
      stored fields of the model.

    Raises:
      WeightsError: if a file is missing or cannot be read.
    """
    path = absolute(folder)
    shapes, config = saved_shapes(path)

    def restore_args(name: str) -> ocp.RestoreArgs:
        dtype = None if dtypes is None else dtypes[name]
        if shardings is None:
            return ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
        return ocp.ArrayRestoreArgs(dtype=dtype, sharding=shardings[name])

    wanted = {name: leaf for name, leaf in shapes.items() if paths is None or name in paths}
    nested = functools.partial(traverse_util.unflatten_dict, sep="/")
    args = ocp.args.PyTreeRestore(
        item=nested(wanted),
        restore_args=nested({name: restore_args(name) for name in wanted}),
        partial_restore=True,
    )
    try:
        with _checkpointer() as checkpointer:
            params = checkpointer.restore(path / _WEIGHTS, args=args)
    except Exception as error:
        raise _unreadable(path, error) from None
    return params, config


def saved_shapes(folder: epath.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return shapes (`.shape`) by path and the stored model fields, without reading the weights.

    Raises:
      WeightsError: as in `load_params_folder`.
    """
    path = absolute(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (path / name).exists():
            raise WeightsError(
                f"{path / name} is missing: {path} is not a folder of saved weights",
                remedy=f"name one that contains {_CONFIG} and {_WEIGHTS}/",
            )
    try:
        config = json.loads((path / _CONFIG).read_text())
        with _checkpointer() as checkpointer:
            tree = checkpointer.metadata(path / _WEIGHTS).item_metadata.tree
    except Exception as error:
        raise _unreadable(path, error) from None
    return traverse_util.flatten_dict(tree, sep="/"), config


def _unreadable(path: epath.Path, error: Exception) -> WeightsError:
    return WeightsError(
        f"the weights in {path} cannot be read: {reason(error)}", remedy="copy or export them again"
    )


def _checkpointer() -> ocp.Checkpointer:
    quiet_orbax()
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def replace_folder(source: epath.Path, target: epath.Path) -> None:
    """Renames a folder over another; the old one is removed afterwards."""
    old = target.parent / f".{target.name}.old"
    if old.exists():
        old.rmtree()
    if target.exists():
        target.rename(old)
    source.rename(target)
    if old.exists():
        old.rmtree()
