"""Files and folders of a run, local or remote, and what goes wrong with them."""

import json
import logging as std_logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from arl2_jax.errors import StorageError

OTHER_FOLDER = "name another folder with --config.train.workdir"
_PROBE_BYTES = 1 << 16


def check_writable(folder: epath.PathLike, size: int = 0, remedy: str = OTHER_FOLDER) -> None:
    """Creates a folder and proves that files can be written there; call it before compiling.

    Args:
      folder: local or remote folder.
      size: bytes that must be free, such as those that a run still writes; only local disks are
        asked.
      remedy: what else the user can do.

    Raises:
      StorageError: one line with the folder, the reason and the remedy.
    """
    path = absolute(folder)
    probe = path / f".write_probe_{jax.process_index()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * _PROBE_BYTES)
        probe.unlink()
    except Exception as error:
        raise StorageError(
            f"cannot write to the folder {path}: {reason(error)}",
            remedy=f"free space there, or {remedy}",
        ) from None
    free = None if is_remote(path) else shutil.disk_usage(path).free
    if free is not None and free < size:
        raise StorageError(
            f"{path} has {free / 2**30:.1f} GiB free, but the run still writes "
            f"{size / 2**30:.1f} GiB",
            remedy=f"free space there, or {remedy}",
        )


def write_whole(path: epath.PathLike, content: bytes) -> None:
    """Writes a file under another name first, so that nobody finds half of it."""
    path = epath.Path(path)
    unfinished = path.parent / f"{path.name}.unfinished"
    unfinished.write_bytes(content)
    unfinished.replace(path)


def move_whole(source: Path, path: epath.PathLike) -> None:
    """Moves a finished local file to its place, local or remote, where nobody finds half of it."""
    path = epath.Path(path)
    unfinished = path.parent / f"{path.name}.unfinished"
    epath.Path(source).copy(unfinished, overwrite=True)
    unfinished.replace(path)
    source.unlink()


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


def as_json(tree: Any) -> Any:
    """The tree as it comes back from a JSON file: tuples are lists, keys are strings."""
    return json.loads(json.dumps(tree))


def reason(error: BaseException) -> str:
    """The cause in a few words: that of the operating system where there is one."""
    system = re.search(r"os_error_code='(\d+)'", str(error))
    if system:
        return os.strerror(int(system[1]))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def absolute(folder: epath.PathLike) -> epath.Path:
    """A local folder as an absolute path, a remote one as it is."""
    path = epath.Path(folder).expanduser()
    return path if is_remote(path) else path.absolute()


def is_remote(path: epath.Path) -> bool:
    """Whether the path is one of a store such as gs://."""
    return "://" in str(path)


def sync(name: str) -> None:
    """Waits until all processes of the run are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def quiet_orbax() -> None:
    """Drops Orbax's progress notes and tracebacks: errors reach the caller as one line."""
    std_logging.getLogger("absl").addFilter(_not_orbax)


def _not_orbax(record: std_logging.LogRecord) -> bool:
    from_orbax = os.path.join("orbax", "checkpoint") in record.pathname
    return not from_orbax or (record.levelno >= std_logging.WARNING and not record.exc_info)


def plain_json(tree: Any) -> Any:
    """A tree of what JSON knows; numbers that are not finite become null."""
    if isinstance(tree, dict):
        return {str(name): plain_json(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple | np.ndarray):
        return [plain_json(value) for value in tree]
    if isinstance(tree, np.generic):
        tree = tree.item()
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
