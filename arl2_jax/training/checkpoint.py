"""Checkpoints of a training run, and folders of final weights (Orbax).

A checkpoint is one folder per step with two items: `state`, the arrays of the training state under
their tree paths, and `meta`, a JSON file with the position of the data and the fingerprint of the
model. Orbax writes into a temporary folder and renames it when complete, so a run that is killed
leaves either a whole checkpoint or one that is ignored and swept away by the next run. A list of
the files' sizes is part of it: a checkpoint that was damaged later is known as such before arrays
are read from it.
"""

import base64
import contextlib
import json
import logging as std_logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from arl2_jax.config import ConfigError

_DELETED = "deleted"
_ITEMS = ("state", "meta")
_UNFINISHED = ".orbax-checkpoint-tmp*"
_SIZES = "sizes.json"
_WEIGHTS = "params"
_CONFIG = "config.json"
_PROBE_BYTES = 1 << 16
_SAVE_TIMEOUT = 3600
_OTHER_FOLDER = "name another folder with --config.train.workdir"

T = TypeVar("T")


class CheckpointError(ConfigError):
    """A checkpoint that cannot be written or read: one line with the folder and the remedy."""


class Checkpointer:
    """Asynchronous, crash-safe checkpoints of one phase of training.

    A state is any pytree of jax arrays (typed PRNG keys included), numpy arrays and Python numbers;
    only the paths of its leaves are stored, so a NamedTuple may become a dataclass with the same
    field names. Every process of a multi-host run makes the same calls; the data position of the
    first process is the one that is stored.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int, fingerprint: Mapping[str, Any]):
        """Opens (and creates) a folder and sweeps up what an interrupted run left there.

        Args:
          folder: local or remote (gs://) folder, used by one run at a time.
          keep: number of newest checkpoints that stay on disk.
          fingerprint: facts of the model, as JSON; `restore` insists that they agree.

        Raises:
          CheckpointError: if the folder cannot be written.
        """
        self._folder = _absolute(folder)
        self._keep = keep
        self._fingerprint = _as_json(fingerprint)
        std_logging.getLogger("absl").addFilter(_quiet_orbax)
        self._saving: int | None = None
        check_writable(self._folder)
        self._sweep()
        self._manager = self._open()

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data_state: Any) -> None:
        """Starts to save; returns once the arrays are copied to the host.

        Args:
          step: number of finished optimizer steps; one that is already on disk is not written anew.
          state: pytree of arrays and numbers; its buffers may be donated after the call.
          data_state: position of the data iterator, as JSON or bytes.

        Raises:
          CheckpointError: if this save cannot start or the one before it has failed.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        self._saving = step
        meta = {"data_state": _encode(data_state), "fingerprint": self._fingerprint}
        arrays = {name: _storable(leaf) for name, leaf in _flatten(state).items()}
        self._write(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(meta)
                ),
                force=True,
            )
        )

    def wait(self) -> None:
        """Returns when the save in progress, if any, is complete on disk.

        Raises:
          CheckpointError: if it has failed; earlier checkpoints are untouched.
        """
        self._write(self._manager.wait_until_finished)

    def restore(self, abstract_state: T) -> tuple[T, Any]:
        """Reads the newest readable checkpoint.

        Args:
          abstract_state: the state's tree with leaves that have shape, dtype and, for jax arrays,
            sharding: `jax.ShapeDtypeStruct`s or a state. The devices and shardings may differ
            from those of the run that saved it.

        Returns:
          (state, data_state) with arrays laid out as in `abstract_state`.

        Raises:
          CheckpointError: if the checkpoint is of another model, or none can be read.
        """
        wanted = _flatten(abstract_state)
        args = ocp.args.PyTreeRestore(
            item={name: np.empty(()) for name in wanted},
            restore_args={name: _restore_args(leaf) for name, leaf in wanted.items()},
        )
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                arrays, data_state = self._read(step, wanted, args)
            except CheckpointError:
                raise
            except Exception as error:  # whatever a damaged file makes the reader raise
                damaged[step] = _reason(error)
                continue
            if damaged:
                self._set_aside(damaged, step)
            leaves = [_restored(arrays[name], leaf) for name, leaf in wanted.items()]
            return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), data_state
        if not damaged:
            raise CheckpointError(f"{self._folder} holds no checkpoint; start the run without one")
        newest = max(damaged)
        raise CheckpointError(
            f"none of the {len(damaged)} checkpoints in {self._folder} can be read (step {newest}: "
            f"{damaged[newest]}); {_OTHER_FOLDER}, or remove this one to start again"
        )

    def close(self) -> None:
        """Waits for the save in progress and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.LatestN(self._keep),
            cleanup_tmp_directories=True,
            # Renamed first and removed later, so that no step is ever seen half deleted.
            todelete_subdir=_DELETED,
            lightweight_initialize=True,
            async_options=ocp.AsyncOptions(
                timeout_secs=_SAVE_TIMEOUT, post_finalization_callback=self._record_sizes
            ),
        )
        return ocp.CheckpointManager(
            self._folder,
            options=options,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def _write(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            latest = self._manager.latest_step()
            intact = "no earlier one exists" if latest is None else f"step {latest} is intact"
            raise CheckpointError(
                f"could not write the checkpoint {self._folder}/{self._saving}: {_reason(error)} "
                f"({intact}); free space there, or {_OTHER_FOLDER}"
            ) from None
        finally:
            if not self._manager.is_saving_in_progress():
                self._sweep()

    def _read(
        self, step: int, wanted: Mapping[str, Any], args: ocp.args.PyTreeRestore
    ) -> tuple[Mapping[str, Any], Any]:
        self._check_sizes(step)
        restore = self._manager.restore
        meta = restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
        self._check_model(step, meta["fingerprint"])
        self._check_arrays(step, wanted)
        arrays = restore(step, args=ocp.args.Composite(state=args))["state"]
        return arrays, _decode(meta["data_state"])

    def _check_model(self, step: int, there: Mapping[str, Any]) -> None:
        found = differences(there, self._fingerprint)
        if found:
            raise CheckpointError(
                f"{self._folder}/{step} is a checkpoint of another model: {found[0]}"
                f"{_and_more(found)}; set it back, or {_OTHER_FOLDER}"
            )

    def _check_arrays(self, step: int, wanted: Mapping[str, Any]) -> None:
        stored = self._manager.item_metadata(step)["state"]
        there = {name: _shape_dtype(leaf) for name, leaf in stored.tree.items()}
        here = {name: _shape_dtype(_abstract_storable(leaf)) for name, leaf in wanted.items()}
        found = differences(there, here)
        if found:
            raise CheckpointError(
                f"{self._folder}/{step} has another training state: {found[0]}"
                f"{_and_more(found)}; set back what that run had, or {_OTHER_FOLDER}"
            )

    def _set_aside(self, damaged: Mapping[int, str], step: int) -> None:
        """Moves unreadable steps out of the way, so that training can write them anew."""
        newest = max(damaged)
        logging.warning(
            f"checkpoint {self._folder}/{newest} cannot be read ({damaged[newest]}): resuming from "
            f"step {step} and renaming it {newest}.damaged"
        )
        if jax.process_index() == 0:
            for bad in damaged:
                aside = self._folder / f"{bad}.damaged"
                if aside.exists():
                    aside.rmtree()
                (self._folder / str(bad)).rename(aside)
        _sync("arl2_set_aside")
        self._manager.reload()

    def _record_sizes(self) -> None:
        """Called when all files are written and the folder still has its temporary name."""
        if jax.process_index() == 0:
            unfinished = list(self._folder.glob(f"{self._saving}{_UNFINISHED}"))
            folder = unfinished[0] if unfinished else self._folder / str(self._saving)
            files = (file for item in _ITEMS for file in _files(folder / item))
            sizes = {str(path.relative_to(folder)): path.stat().length for path in files}
            (folder / _SIZES).write_text(json.dumps(sizes))

    def _check_sizes(self, step: int) -> None:
        """Raises OSError if a file was lost or cut off."""
        folder = self._folder / str(step)
        for name, size in json.loads((folder / _SIZES).read_text()).items():
            found = (folder / name).stat().length
            if found != size:
                raise OSError(f"{name} has {found} bytes instead of {size}")

    def _sweep(self) -> None:
        """Removes unfinished checkpoints and those that keep-N has put aside."""
        if jax.process_index() == 0:
            for path in [*self._folder.glob(f"*{_UNFINISHED}"), self._folder / _DELETED]:
                # Threads of a failed save may still be writing; the next sweep takes the rest.
                with contextlib.suppress(OSError):
                    path.rmtree(missing_ok=True)


def check_writable(folder: epath.PathLike, size: int = 0) -> None:
    """Creates a folder and proves that files can be written there; call it before compiling.

    Args:
      folder: local or remote folder.
      size: bytes that must be free, e.g. of one checkpoint; only local disks are asked.

    Raises:
      CheckpointError: one line with the folder, the reason and the remedy.
    """
    path = _absolute(folder)
    probe = path / f".write_probe_{jax.process_index()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * _PROBE_BYTES)
        probe.unlink()
    except Exception as error:
        raise CheckpointError(
            f"cannot write to the folder {path}: {_reason(error)}; free space there, or "
            f"{_OTHER_FOLDER}"
        ) from None
    free = None if _is_remote(path) else shutil.disk_usage(path).free
    if free is not None and free < size:
        raise CheckpointError(
            f"{path} has {free / 2**30:.1f} GiB free, but a checkpoint takes {size / 2**30:.1f} "
            f"GiB; free space there, or {_OTHER_FOLDER}"
        )


def save_params(
    folder: epath.PathLike, params: Mapping[str, Any], model_config: Mapping[str, Any]
) -> None:
    """Writes final weights: an Orbax folder `params` and `config.json`, both or neither.

    Args:
      folder: destination; weights that are already there are replaced.
      params: nested dict, with string keys, of arrays.
      model_config: fields of the model, as JSON.

    Raises:
      CheckpointError: if the folder cannot be written.
    """
    target = _absolute(folder)
    # Remote stores cannot rename a folder; there config.json comes last and marks the end.
    place = target if _is_remote(target) else target.parent / f".{target.name}.unfinished"
    try:
        if jax.process_index() == 0:
            target.parent.mkdir(parents=True, exist_ok=True)
            (place / _CONFIG).unlink(missing_ok=True)
            if place != target and place.exists():
                place.rmtree()
        _sync("arl2_save_params")
        with _params_checkpointer() as checkpointer:
            checkpointer.save(place / _WEIGHTS, args=ocp.args.PyTreeSave(params), force=True)
        if jax.process_index() == 0:
            (place / _CONFIG).write_text(json.dumps(_as_json(model_config), indent=2) + "\n")
            if place != target:
                _replace(place, target)
        _sync("arl2_save_params")
    except Exception as error:
        raise CheckpointError(
            f"could not write weights to {target}: {_reason(error)}; free space there or name "
            "another folder"
        ) from None


def load_params_folder(folder: epath.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a folder written by `save_params`.

    Returns:
      (params, model_config): a nested dict of numpy arrays and the stored fields of the model.

    Raises:
      CheckpointError: if a file is missing or cannot be read.
    """
    path = _absolute(folder)
    for name in (_CONFIG, _WEIGHTS):
        if not (path / name).exists():
            raise CheckpointError(
                f"{path / name} is missing: {path} is not a folder of saved weights; name one that "
                f"holds {_CONFIG} and {_WEIGHTS}/"
            )
    try:
        config = json.loads((path / _CONFIG).read_text())
        with _params_checkpointer() as checkpointer:
            tree = checkpointer.metadata(path / _WEIGHTS).item_metadata.tree
            restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            params = checkpointer.restore(
                path / _WEIGHTS, args=ocp.args.PyTreeRestore(restore_args=restore_args)
            )
    except Exception as error:
        raise CheckpointError(
            f"the weights in {path} cannot be read: {_reason(error)}; copy or export them again"
        ) from None
    return params, config


def differences(there: Any, here: Any, path: str = "") -> list[str]:
    """Compares two JSON trees.

    Returns:
      For each field that differs, a text such as "model.dim is 128 there and 256 here".
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        absent = "absent"
        return [
            text
            for name in sorted({*there, *here})
            for text in differences(
                there.get(name, absent), here.get(name, absent), f"{path}.{name}" if path else name
            )
        ]
    return [] if there == here else [f"{path} is {there} there and {here} here"]


def _flatten(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the state have the same path")
    return named


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.int32), jax.dtypes.prng_key)


def _storable(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _abstract_storable(leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.eval_shape(jax.random.key_data, leaf)
    return leaf if hasattr(leaf, "dtype") else np.asarray(leaf)


def _key_impl(leaf: Any) -> Any:
    found = []  # key_impl takes arrays only, and an abstract leaf has none
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), leaf)
    return found[0]


def _on_host(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if _on_host(leaf):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    stored = _abstract_storable(leaf)
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=stored.shape, dtype=stored.dtype)


def _restored(array: Any, leaf: Any) -> Any:
    if _is_key(leaf):
        return jax.random.wrap_key_data(array, impl=_key_impl(leaf))
    return type(leaf)(array.item()) if isinstance(leaf, bool | int | float) else array


def _shape_dtype(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"


def _as_json(tree: Any) -> Any:
    """The tree as it comes back from a JSON file: tuples are lists, keys are strings."""
    return json.loads(json.dumps(tree))


def _encode(data_state: Any) -> dict[str, Any]:
    if isinstance(data_state, bytes):
        return {"base64": base64.b64encode(data_state).decode("ascii")}
    return {"json": _as_json(data_state)}


def _decode(encoded: Mapping[str, Any]) -> Any:
    return base64.b64decode(encoded["base64"]) if "base64" in encoded else encoded["json"]


def _and_more(found: list[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _reason(error: BaseException) -> str:
    """The cause in a few words: that of the operating system where there is one."""
    system = re.search(r"os_error_code='(\d+)'", str(error))
    if system:
        return os.strerror(int(system[1]))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def _absolute(folder: epath.PathLike) -> epath.Path:
    path = epath.Path(folder).expanduser()
    return path if _is_remote(path) else path.absolute()


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        yield from _files(path) if path.is_dir() else (path,)


def _replace(source: epath.Path, target: epath.Path) -> None:
    """Renames a folder over another; what was there is removed afterwards."""
    old = target.parent / f".{target.name}.old"
    if old.exists():
        old.rmtree()
    if target.exists():
        target.rename(old)
    source.rename(target)
    if old.exists():
        old.rmtree()


def _sync(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _params_checkpointer() -> ocp.Checkpointer:
    std_logging.getLogger("absl").addFilter(_quiet_orbax)
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _quiet_orbax(record: std_logging.LogRecord) -> bool:
    """Drops Orbax's progress notes and tracebacks: errors reach the caller as one line."""
    from_orbax = os.path.join("orbax", "checkpoint") in record.pathname
    return not from_orbax or (record.levelno >= std_logging.WARNING and not record.exc_info)
