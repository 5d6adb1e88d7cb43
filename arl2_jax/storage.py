"""Files and folders, local or remote, and errors of their use."""

import os
import re
import shutil
from pathlib import Path

import jax
from etils import epath

from arl2_jax.errors import StorageError

_PROBE_BYTES = 1 << 16


def check_writable(folder: epath.PathLike, size: int = 0, field: str = "folder") -> None:
    """Create a folder and test that files can be written there; call it before compiling.

    Args:
      folder: local or remote folder.
      size: bytes that must be free, such as those that a run still writes; checked on local disks
        only.
      field: the caller's setting or argument that names the folder.

    Raises:
      StorageError: the folder cannot be written, or has too little space.
    """
    path = absolute(folder)
    refuse = lambda problem: StorageError(
        problem, field=field, value=path, remedy="free space there, or name another folder"
    )
    probe = path / f".write_probe_{jax.process_index()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * _PROBE_BYTES)
        probe.unlink()
    except Exception as error:
        raise refuse(f"cannot be written: {reason(error)}") from None
    free = None if is_remote(path) else shutil.disk_usage(path).free
    if free is not None and free < size:
        raise refuse(
            f"has {free / 2**30:.1f} GiB free, but the run still writes {size / 2**30:.1f} GiB"
        )


def write_whole(path: epath.PathLike, content: bytes) -> None:
    """Write a file atomically: under another name first, then rename it."""
    path = epath.Path(path)
    unfinished = path.parent / f"{path.name}.unfinished"
    unfinished.write_bytes(content)
    unfinished.replace(path)


def move_whole(source: Path, path: epath.PathLike) -> None:
    """Move a finished local file atomically to its place, local or remote."""
    path = epath.Path(path)
    unfinished = path.parent / f"{path.name}.unfinished"
    epath.Path(source).copy(unfinished, overwrite=True)
    unfinished.replace(path)
    source.unlink()


def reason(error: BaseException) -> str:
    """Return the cause of an error in a few words: the operating system's if there is one."""
    system = re.search(r"os_error_code='(\d+)'", str(error))
    if system:
        return os.strerror(int(system[1]))
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


def absolute(folder: epath.PathLike) -> epath.Path:
    """Return a local folder as an absolute path, a remote one unchanged."""
    path = epath.Path(folder).expanduser()
    return path if is_remote(path) else path.absolute()


def is_remote(path: epath.Path) -> bool:
    """Tell whether the path is in an object store such as gs://."""
    return "://" in str(path)
