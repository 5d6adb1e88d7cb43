"""Stored latents: clips that were encoded once, before training.

A folder of stored latents holds `manifest.json` and ArrayRecord shards. A record is the bytes of
the latents [T, h, w, C] followed by those of the text's rows up to the last one that is not zero,
both in the manifest's dtype, little-endian, last axis fastest.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from arl2_jax.config import Config, ConfigError

FORMAT = 1
MANIFEST = "manifest.json"
DTYPES = ("bfloat16", "float16", "float32")
_REMEDY = (
    "the folder is made by arl2_jax.data.LatentWriter; or run with --config.data.source=synthetic"
)


class LatentWriter:
    """Writes a folder of stored latents; a context manager.

    Shards get their names when they are complete, the manifest is written last: a folder with a
    manifest is whole. After an exception there is none.

    Args:
      path: folder; made if missing. It must not hold a manifest yet.
      latent_shape: (T, h, w, C) of every clip.
      text_shape: (text_len, text_dim) of every text.
      dtype: "bfloat16", "float16" or "float32"; what is written is cast to it.
      records_per_shard: clips in a file.
      source: free words on where the clips came from.

    Raises:
      ValueError: an unknown dtype.
      FileExistsError: the folder holds stored latents already.
    """

    def __init__(
        self,
        path: str | Path,
        latent_shape: tuple[int, int, int, int],
        text_shape: tuple[int, int],
        dtype: str = "bfloat16",
        records_per_shard: int = 256,
        source: str = "",
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
        self._folder = Path(path)
        if (self._folder / MANIFEST).exists():
            raise FileExistsError(f"{self._folder / MANIFEST} exists; name another folder")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._records_per_shard = records_per_shard
        self._latent_shape, self._text_shape, self._dtype = latent_shape, text_shape, dtype
        self._source = source
        self._shards: list[dict[str, Any]] = []
        self._writer: Any = None
        self._pending = 0

    def __enter__(self) -> "LatentWriter":
        return self

    def write(self, latents: np.ndarray, text: np.ndarray) -> None:
        """Appends a clip.

        Args:
          latents: [T, h, w, C], any float type.
          text: [text_len, text_dim], any float type, zeros past the prompt.

        Raises:
          ValueError: a wrong shape, or values that are not finite in the dtype of the folder.
        """
        used = int(np.flatnonzero(np.any(np.asarray(text) != 0, axis=-1)).max(initial=-1)) + 1
        record = self._bytes("latents", latents, self._latent_shape)
        text_bytes = self._bytes("text", text, self._text_shape)
        record += text_bytes[: used * len(text_bytes) // self._text_shape[0]]
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
        manifest = {
            "format": FORMAT,
            "latent_shape": self._latent_shape,
            "text_shape": self._text_shape,
            "dtype": self._dtype,
            "count": sum(shard["count"] for shard in self._shards),
            "shards": self._shards,
            "source": self._source,
        }
        temporary = self._folder / f"{MANIFEST}.tmp"
        temporary.write_text(json.dumps(manifest, indent=1))
        temporary.replace(self._folder / MANIFEST)

    @property
    def _temporary(self) -> Path:
        return self._folder / f"{len(self._shards):05d}.tmp"

    def _bytes(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> bytes:
        array = np.asarray(array)
        if array.shape != tuple(shape):
            raise ValueError(f"{name} {array.shape} must have the shape {tuple(shape)}")
        with np.errstate(over="ignore"):
            array = array.astype(_stored(self._dtype))
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"{name} hold values that are not finite in {self._dtype}")
        return array.tobytes()

    def _finish_shard(self) -> None:
        self._writer.close()
        path = self._folder / f"{len(self._shards):05d}.array_record"
        shard = {
            "name": path.name,
            "count": self._pending,
            "bytes": self._temporary.stat().st_size,
            "sha256": _sha256(self._temporary),
        }
        self._temporary.replace(path)
        self._shards.append(shard)
        self._writer, self._pending = None, 0


class LatentSource:
    """Random access to a folder of stored latents; the last `data.held_out` clips are held out.

    Opening compares names, sizes and counts with the manifest; damage inside a shard is found by
    its checksums when the record is read, or all at once by `verify`.

    Args:
      config: data.path, data.held_out and the shapes of the model and of the data are read.

    Raises:
      ConfigError: a file is missing or damaged, the shapes are not the configuration's, or
        `data.held_out` leaves nothing to train on.
    """

    def __init__(self, config: Config):
        self._folder = Path(config.data.path)
        self.manifest = _read_manifest(self._folder)
        _compare(self.manifest, config, self._folder)
        self._dtype = _stored(self.manifest["dtype"])
        self._latent_shape = tuple(self.manifest["latent_shape"])
        self._text_shape = tuple(self.manifest["text_shape"])
        self._records = self._open_shards()
        self._training = len(self._records) - config.data.held_out
        if self._training < 1:
            raise ConfigError(
                f"data.held_out={config.data.held_out} leaves none of the {len(self._records)} "
                f"clips in data.path={self._folder} for training; lower it"
            )

    def __len__(self) -> int:
        return self._training

    def training(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Clip `index`: `latents` float32 [T, h, w, C], `text` float32 [text_len, text_dim]."""
        del rng
        return self[index]

    def held_out(self, index: int) -> dict[str, np.ndarray]:
        """Held-out clip `index`, of the same keys."""
        return self[self._training + index]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        try:
            values = np.frombuffer(self._records[index], self._dtype).astype(np.float32)
        except (RuntimeError, ValueError) as error:
            raise _damaged(self._shard_of(index), error) from error
        size, width = math.prod(self._latent_shape), self._text_shape[1]
        used = values[size:]
        if len(values) < size or len(used) % width or len(used) > math.prod(self._text_shape):
            raise _damaged(self._shard_of(index), f"record {index} has {len(values)} values")
        text = np.zeros(self._text_shape, np.float32)
        text[: len(used) // width] = used.reshape(-1, width)
        return {"latents": values[:size].reshape(self._latent_shape), "text": text}

    def verify(self) -> None:
        """Reads every shard and compares its SHA-256 with the manifest's.

        Raises:
          ConfigError: naming the first shard that differs.
        """
        for shard in self.manifest["shards"]:
            if _sha256(self._folder / shard["name"]) != shard["sha256"]:
                raise _damaged(self._folder / shard["name"], "its SHA-256 is not the manifest's")

    def _open_shards(self) -> ArrayRecordDataSource:
        paths = []
        for shard in self.manifest["shards"]:
            path = self._folder / shard["name"]
            if not path.is_file():
                raise ConfigError(
                    f"{shard['name']} is missing in data.path={self._folder}, but {MANIFEST} "
                    f"lists it; copy it there again ({_REMEDY})"
                )
            if path.stat().st_size != shard["bytes"]:
                sizes = f"{path.stat().st_size} bytes instead of {shard['bytes']}"
                raise _damaged(path, sizes)
            paths.append(str(path))
        try:
            records = ArrayRecordDataSource(paths)
            count = len(records)
        except RuntimeError as error:
            raise _damaged(self._folder, error) from error
        if count != self.manifest["count"]:
            raise _damaged(self._folder, f"{count} records instead of {self.manifest['count']}")
        return records

    def _shard_of(self, index: int) -> Path:
        ends = np.cumsum([shard["count"] for shard in self.manifest["shards"]])
        shard = self.manifest["shards"][int(np.searchsorted(ends, index, "right"))]
        return self._folder / shard["name"]


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        missing = MANIFEST if folder.is_dir() else f"the folder with {MANIFEST}"
        raise ConfigError(f"{missing} is missing: looked for {path} (data.path); {_REMEDY}")
    try:
        manifest = json.loads(path.read_text())
        found = manifest["format"]
        known = {"latent_shape", "text_shape", "dtype", "count", "shards"} <= manifest.keys()
        for shard in manifest.get("shards", ()):
            known &= {"name", "count", "bytes", "sha256"} <= shard.keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, repr(error)) from error
    if found != FORMAT or not known or manifest["dtype"] not in DTYPES:
        raise ConfigError(
            f"{path} has format {found!r}, this program reads format {FORMAT}; write the folder "
            f"again ({_REMEDY})"
        )
    if not manifest["shards"]:
        raise ConfigError(f"{path} lists no clips; {_REMEDY}")
    return manifest


def _compare(manifest: dict[str, Any], config: Config, folder: Path) -> None:
    model, data = config.model, config.data
    for key, expected, fields in (
        (
            "latent_shape",
            (data.frames, *config.latent_shape),
            "data.frames, data.height, data.width, data.codec_factor and model.in_dim",
        ),
        ("text_shape", (model.text_len, model.text_dim), "model.text_len and model.text_dim"),
    ):
        if tuple(manifest[key]) != expected:
            raise ConfigError(
                f"{folder / MANIFEST} has {key}={tuple(manifest[key])}, but {fields} give "
                f"{expected}; change them or store the latents again"
            )


def _damaged(path: Path, reason: object) -> ConfigError:
    words = " ".join(str(reason).split())
    return ConfigError(
        f"{path} (data.path) is damaged: {words}; copy or write it again ({_REMEDY})"
    )


def _stored(dtype: str) -> np.dtype:
    return np.dtype(jnp.dtype(dtype)).newbyteorder("<")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
