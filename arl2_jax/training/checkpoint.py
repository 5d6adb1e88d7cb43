"""Checkpoints of a training run (Orbax).

A checkpoint is one folder per step with two items: `state`, the arrays of the training state under
their tree paths, and `meta`, a JSON file with the position of the data and the fingerprint of the
model. Orbax writes into a temporary folder and renames it when complete, so a run that is killed
leaves either a whole checkpoint or one that the next run ignores and removes. A checkpoint also
lists the sizes of its files, so that later damage is found before any array is read.
"""

import base64
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from arl2_jax.errors import ConfigError, StorageError, UserError, WeightsError
from arl2_jax.json_trees import as_json, differences
from arl2_jax.processes import sync
from arl2_jax.storage import absolute, check_writable, reason
from arl2_jax.weights.orbax_log import quiet_orbax

_DELETED = "deleted"
_ITEMS = ("state", "meta")
_UNFINISHED = ".orbax-checkpoint-tmp*"
_SIZES = "sizes.json"
_SAVE_TIMEOUT = 3600
# Key of a fingerprint: checksum of the weights that the phase reads and does not train.
FROZEN = "frozen"

T = TypeVar("T")


class Checkpointer:
    """Asynchronous, crash-safe checkpoints of one phase of training.

    A state is any pytree of jax arrays (typed PRNG keys included), numpy arrays and Python numbers;
    only the paths of its leaves are stored, so a NamedTuple may become a dataclass with the same
    field names. Every process of a multi-host run makes the same calls; the first process's data
    position is stored.
    """

    def __init__(self, folder: epath.PathLike, *, keep: int, fingerprint: Mapping[str, Any]):
        """Open or create a folder, and remove what an interrupted run left there.

        Args:
          folder: local or remote (gs://) folder, used by one run at a time.
          keep: number of newest checkpoints to keep on disk.
          fingerprint: facts of the model, as JSON; `restore` requires that they agree. Older
            checkpoints, which lack `FROZEN`, are read with a warning.

        Raises:
          StorageError: if the folder cannot be written.
        """
        self._folder = absolute(folder)
        self._keep = keep
        self._fingerprint = as_json(fingerprint)
        quiet_orbax()
        self._saving: int | None = None
        check_writable(self._folder)
        self._sweep()
        self._manager = self._open()

    def latest_step(self) -> int | None:
        """Return the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data_state: Any) -> None:
        """Start to save; return once the arrays are copied to the host.

        Args:
          step: number of finished optimizer steps; a step already on disk is not written again.
          state: pytree of arrays and numbers; its buffers may be donated after the call.
          data_state: position of the data iterator, as JSON or bytes.

        Raises:
          StorageError: if this save cannot start or the one before it has failed.
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
        """Return when the save in progress, if any, is complete on disk.

        Raises:
          StorageError: if it has failed; earlier checkpoints are untouched.
        """
        self._write(self._manager.wait_until_finished)

    def restore(self, abstract_state: T) -> tuple[T, Any]:
        """Read the newest readable checkpoint.

        Args:
          abstract_state: the state's tree with leaves that have shape, dtype and, for jax arrays,
            sharding: `jax.ShapeDtypeStruct`s or a state. The devices and shardings may differ
            from those of the run that saved it.

        Returns:
          (state, data_state) with arrays laid out as in `abstract_state`.

        Raises:
          ConfigError: if the checkpoint is of another model.
          WeightsError: if it was trained with other frozen weights.
          StorageError: if none can be read.
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
            except UserError:
                raise
            except Exception as error:  # a damaged file may raise anything
                damaged[step] = reason(error)
                continue
            if damaged:
                self._set_aside(damaged, step)
            leaves = [_restored(arrays[name], leaf) for name, leaf in wanted.items()]
            return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), data_state
        if not damaged:
            raise StorageError(
                f"{self._folder} holds no checkpoint", remedy="start the run without one"
            )
        newest = max(damaged)
        raise StorageError(
            f"none of the {len(damaged)} checkpoints in {self._folder} can be read (step "
            f"{newest}: {damaged[newest]})",
            remedy="name another train.workdir, or remove this folder to start again",
        )

    def close(self) -> None:
        """Wait for the save in progress and release the folder."""
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
            # Renames first and deletes later, so that no half-deleted step is visible.
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
            raise StorageError(
                f"could not write the checkpoint {self._folder}/{self._saving}: "
                f"{reason(error)} ({intact})",
                remedy="free space there, or name another train.workdir",
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
        here = dict(self._fingerprint)
        frozen = here.pop(FROZEN, None)
        found = differences({k: v for k, v in there.items() if k != FROZEN}, here)
        if found:
            raise ConfigError(
                f"{self._folder}/{step} is a checkpoint of another model: "
                f"{found[0]}{_and_more(found)}",
                remedy="set it back, or name another train.workdir",
            )
        if frozen and FROZEN not in there:
            logging.warning(
                f"{self._folder}/{step} does not name its frozen weights; those of this run are "
                "taken to be the same, and later checkpoints will name them"
            )
        elif frozen != there.get(FROZEN):
            raise WeightsError(
                f"{self._folder}/{step} is a checkpoint of {here.get('phase', 'a phase')} with "
                f"other frozen weights: checksum {there.get(FROZEN)} there and {frozen} here",
                remedy="put the teacher's weights back, or start in another folder",
            )

    def _check_arrays(self, step: int, wanted: Mapping[str, Any]) -> None:
        stored = self._manager.item_metadata(step)["state"]
        there = {name: _shape_dtype(leaf) for name, leaf in stored.tree.items()}
        here = {name: _shape_dtype(_abstract_storable(leaf)) for name, leaf in wanted.items()}
        found = differences(there, here)
        if found:
            raise ConfigError(
                f"{self._folder}/{step} has another training state: {found[0]}{_and_more(found)}",
                remedy="set back what that run had, or name another train.workdir",
            )

    def _set_aside(self, damaged: Mapping[int, str], step: int) -> None:
        """Rename unreadable steps, so that training can write them again."""
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
        sync("arl2_set_aside")
        self._manager.reload()

    def _record_sizes(self) -> None:
        """Write the sizes of all files; Orbax calls this before it renames the folder."""
        if jax.process_index() == 0:
            unfinished = list(self._folder.glob(f"{self._saving}{_UNFINISHED}"))
            folder = unfinished[0] if unfinished else self._folder / str(self._saving)
            files = (file for item in _ITEMS for file in _files(folder / item))
            sizes = {str(path.relative_to(folder)): path.stat().length for path in files}
            (folder / _SIZES).write_text(json.dumps(sizes))

    def _check_sizes(self, step: int) -> None:
        """Raise OSError if a file is missing or truncated."""
        folder = self._folder / str(step)
        for name, size in json.loads((folder / _SIZES).read_text()).items():
            found = (folder / name).stat().length
            if found != size:
                raise OSError(f"{name} has {found} bytes instead of {size}")

    def _sweep(self) -> None:
        """Remove unfinished checkpoints and those that keep-N has marked for deletion."""
        if jax.process_index() == 0:
            for path in [*self._folder.glob(f"*{_UNFINISHED}"), self._folder / _DELETED]:
                # Threads of a failed save may still be writing; the next sweep removes the rest.
                with contextlib.suppress(OSError):
                    path.rmtree(missing_ok=True)


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


def _encode(data_state: Any) -> dict[str, Any]:
    if isinstance(data_state, bytes):
        return {"base64": base64.b64encode(data_state).decode("ascii")}
    return {"json": as_json(data_state)}


def _decode(encoded: Mapping[str, Any]) -> Any:
    return base64.b64decode(encoded["base64"]) if "base64" in encoded else encoded["json"]


def _and_more(found: list[str]) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        yield from _files(path) if path.is_dir() else (path,)
