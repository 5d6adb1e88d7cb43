"""Writes stored latents, so that a killed run resumes after the last complete shard."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from arl2_jax.data.manifest import MANIFEST, UNFINISHED, Manifest, Shard, read_manifest, sha256
from arl2_jax.errors import ConfigError, DataError


class LatentWriter:
    """Writes a folder of stored latents; a context manager.

    Shards get their names when they are complete, and each is entered in `unfinished.json`, which
    becomes the manifest at the end: a folder with a manifest is complete. After an exception or a
    kill, a writer with `resume=True` continues after the last complete shard.

    Args:
      path: folder; created if missing. It must not have a manifest yet.
      latent_shape: (T, h, w, C) of every clip.
      text_shape: (text_len, text_dim) of every text.
      dtype: "bfloat16", "float16" or "float32"; latents and texts are cast to it.
      records_per_shard: clips in a file.
      codec: name of the codec of the latents, "wan_vae" or "space_to_depth".
      codec_weights: fingerprint of its weights (`arl2_jax.weights.fingerprint`), if known.
      source: where the clips came from, as JSON; a resumed writer must be given the same.
      resume: whether an unfinished folder is continued.

    Attributes:
      count: clips in the folder so far, and the index at which a resumed caller continues.

    Raises:
      ValueError: an unknown dtype.
      FileExistsError: the folder has stored latents, or unfinished ones and `resume` is false.
      ConfigError: the unfinished latents are of other shapes or from another source.
      DataError: a file of theirs is missing or damaged.
    """

    def __init__(
        self,
        path: str | Path,
        latent_shape: tuple[int, int, int, int],
        text_shape: tuple[int, int],
        dtype: str = "bfloat16",
        records_per_shard: int = 256,
        codec: str = "wan_vae",
        codec_weights: str = "",
        source: Mapping[str, Any] | None = None,
        resume: bool = False,
    ):
        names = {"name": codec} | ({"weights": codec_weights} if codec_weights else {})
        manifest = Manifest(latent_shape, text_shape, dtype, names, source or {})
        self._folder, self._records_per_shard = Path(path), records_per_shard
        if (self._folder / MANIFEST).exists():
            raise FileExistsError(f"{self._folder / MANIFEST} exists; name another folder")
        unfinished = self._folder / UNFINISHED
        if unfinished.exists():
            manifest = _continued(unfinished, manifest, resume)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._manifest = manifest
        self._writer: Any = None
        self._pending = 0

    @property
    def count(self) -> int:
        """Return the number of clips written so far, by earlier runs too."""
        return self._manifest.count + self._pending

    def __enter__(self) -> "LatentWriter":
        return self

    def write(self, latents: np.ndarray, text: np.ndarray) -> None:
        """Append a clip.

        Args:
          latents: [T, h, w, C], any float type.
          text: [text_len, text_dim], any float type, zeros past the prompt.

        Raises:
          ValueError: a wrong shape, or values that are not finite in the dtype of the folder.
        """
        record = self._manifest.pack(latents, text)
        if self._writer is None:
            # One record a chunk, so that reading a clip reads no other; floats do not compress.
            self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1,uncompressed")
        self._writer.write(record)
        self._pending += 1
        if self._pending == self._records_per_shard:
            self._finish_shard()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            if self._writer is not None:
                self._writer.close()
                self._temporary.unlink(missing_ok=True)
            return
        if self._pending:
            self._finish_shard()
        self._manifest.write(self._folder / MANIFEST)
        (self._folder / UNFINISHED).unlink(missing_ok=True)

    @property
    def _temporary(self) -> Path:
        return self._folder / f"{len(self._manifest.shards):05d}.tmp"

    def _finish_shard(self) -> None:
        self._writer.close()
        path = self._temporary.with_suffix(".array_record")
        size, digest = self._temporary.stat().st_size, sha256(self._temporary)
        self._temporary.replace(path)
        shards = (*self._manifest.shards, Shard(path.name, self._pending, size, digest))
        self._manifest = self._manifest.with_shards(shards)
        self._manifest.write(self._folder / UNFINISHED)
        self._writer, self._pending = None, 0


def _continued(path: Path, wanted: Manifest, resume: bool) -> Manifest:
    """Read the manifest of an unfinished folder, and check it against the wanted one."""
    if not resume:
        raise FileExistsError(f"{path} exists; resume it or name another folder")
    found = read_manifest(path)
    differing = found.differences(wanted)
    if differing:
        raise ConfigError(
            f"{path} was started with other {', '.join(differing)}",
            remedy="use the same settings again, or name another folder",
        )
    for shard in found.shards:
        file = path.parent / shard.name
        if not file.is_file() or file.stat().st_size != shard.bytes:
            raise DataError(
                f"{file} is missing or of another size than {path} lists",
                remedy="remove the folder and start again",
            )
    return found
