"""The format of stored latents: a manifest and ArrayRecord shards in one folder.

`docs/latents.md` describes it for other programs.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from arl2_jax.errors import DataError
from arl2_jax.json_trees import as_json

FORMAT = 2
MANIFEST = "manifest.json"
# The manifest of an incomplete folder; it lists the complete shards.
UNFINISHED = "unfinished.json"
DTYPES = ("bfloat16", "float16", "float32")
_REMEDY = (
    "arl2_jax.preparation and arl2_jax.data.LatentWriter make such folders; or set "
    "data.source=synthetic"
)


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of records: its name, records, size, and SHA-256 in hexadecimal digits."""

    name: str
    count: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Description of a folder of stored latents.

    Attributes:
      latent_shape: (T, h, w, C) of every clip.
      text_shape: (text_len, text_dim) of every text.
      dtype: one of `DTYPES`, for both latents and text.
      codec: "name" of the codec ("wan_vae" or "space_to_depth"), and "weights", their fingerprint,
        if it has any.
      source: where the clips came from, in any fields.
      shards: files of records, in order.
    """

    latent_shape: tuple[int, int, int, int]
    text_shape: tuple[int, int]
    dtype: str
    codec: Mapping[str, str]
    source: Mapping[str, Any]
    shards: tuple[Shard, ...] = ()

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")
        for name, axes in (("latent_shape", 4), ("text_shape", 2)):
            shape = getattr(self, name)
            if len(shape) != axes or min(shape) < 1:
                raise ValueError(f"{name}={shape} must be {axes} positive numbers")
        if "name" not in self.codec:
            raise ValueError(f"codec={dict(self.codec)} must have a name")

    @property
    def count(self) -> int:
        """Return the number of clips in all shards."""
        return sum(shard.count for shard in self.shards)

    @property
    def storage_dtype(self) -> np.dtype:
        """Return the dtype of the stored numbers."""
        return np.dtype(jnp.dtype(self.dtype)).newbyteorder("<")

    def with_shards(self, shards: tuple[Shard, ...]) -> "Manifest":
        """Return a copy with other shards."""
        return dataclasses.replace(self, shards=shards)

    def differences(self, other: "Manifest") -> list[str]:
        """Return the names of the fields in which two manifests differ, except shards."""
        ours, theirs = (as_json(dataclasses.asdict(x)) for x in (self, other))
        return [name for name in ours if name != "shards" and ours[name] != theirs[name]]

    def pack(self, latents: np.ndarray, text: np.ndarray) -> bytes:
        """Encode a clip as a record: all latents, then the text up to its last used row.

        Raises:
          ValueError: a wrong shape, or values that are not finite in the folder's dtype.
        """
        used = int(np.flatnonzero(np.any(np.asarray(text) != 0, axis=-1)).max(initial=-1)) + 1
        record = self._bytes("latents", latents, self.latent_shape)
        row = self.storage_dtype.itemsize * self.text_shape[1]
        return record + self._bytes("text", text, self.text_shape)[: used * row]

    def unpack(self, record: bytes) -> dict[str, np.ndarray]:
        """Decode a record: `latents` float32 [T, h, w, C], `text` float32 [text_len, text_dim].

        Raises:
          ValueError: the record's length is not that of a clip.
        """
        values = np.frombuffer(record, self.storage_dtype).astype(np.float32)
        size, width = math.prod(self.latent_shape), self.text_shape[1]
        used = values[size:]
        if len(values) < size or len(used) % width or len(used) > math.prod(self.text_shape):
            raise ValueError(f"a record has {len(values)} values")
        text = np.zeros(self.text_shape, np.float32)
        text[: len(used) // width] = used.reshape(-1, width)
        return {"latents": values[:size].reshape(self.latent_shape), "text": text}

    def write(self, path: Path) -> None:
        """Write the manifest atomically."""
        content = {"format": FORMAT, "count": self.count} | dataclasses.asdict(self)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(path)

    def _bytes(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> bytes:
        array = np.asarray(array)
        if array.shape != tuple(shape):
            raise ValueError(f"{name} {array.shape} must have the shape {tuple(shape)}")
        with np.errstate(over="ignore"):
            array = array.astype(self.storage_dtype)
        if not np.isfinite(array.astype(np.float32)).all():
            raise ValueError(f"{name} hold values that are not finite in {self.dtype}")
        return array.tobytes()


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.

    Raises:
      DataError: it is missing, damaged or of another format.
    """
    folder = path.parent
    if not path.is_file():
        missing = path.name if folder.is_dir() else f"the folder with {path.name}"
        hint = _REMEDY
        if (folder / UNFINISHED).is_file():
            hint = f"{UNFINISHED} is there: finish it with the command that started it"
        raise DataError(f"{missing} is missing: looked for {path}", remedy=hint)
    try:
        content = json.loads(path.read_text())
        found = content["format"]
        if found != FORMAT:
            raise DataError(
                f"{path} has format {found!r}, this program reads format {FORMAT}",
                remedy=f"write the folder again ({_REMEDY})",
            )
        shards = tuple(Shard(**shard) for shard in content["shards"])
        manifest = Manifest(
            **{name: _tupled(content[name]) for name in _FIELDS if name != "shards"}, shards=shards
        )
        consistent = manifest.count == content["count"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise damaged_error(path, repr(error)) from None
    if not consistent:
        raise damaged_error(
            path, f"its shards have {manifest.count} records, not {content['count']}"
        )
    return manifest


def damaged_error(path: Path, reason: object) -> DataError:
    """Return the error for a damaged file of stored latents."""
    words = " ".join(str(reason).split())
    return DataError(f"{path} is damaged: {words}", remedy=f"copy or write it again ({_REMEDY})")


def empty_error(path: Path) -> DataError:
    """Return the error for a folder without clips."""
    return DataError(f"{path} lists no clips", remedy=_REMEDY)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_FIELDS = tuple(field.name for field in dataclasses.fields(Manifest))
