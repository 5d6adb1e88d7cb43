"""Stored latents: clips encoded once, before training."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from arl2_jax.codecs import vae_weights
from arl2_jax.config import Config
from arl2_jax.data.manifest import (
    MANIFEST,
    Manifest,
    damaged_error,
    empty_error,
    read_manifest,
    sha256,
)
from arl2_jax.errors import ConfigError, DataError
from arl2_jax.weights import fingerprint


class LatentFolder:
    """Random access to the clips of a folder of stored latents.

    Opening compares names, sizes and counts with the manifest; damage inside a shard is found by
    its checksums when the record is read, or all at once by `check_latents`.

    Args:
      path: the folder.

    Raises:
      DataError: a file is missing or damaged, or the folder has no clips.
    """

    def __init__(self, path: str | Path):
        self._folder = Path(path)
        self.manifest = read_manifest(self._folder / MANIFEST)
        if not self.manifest.shards:
            raise empty_error(self._folder / MANIFEST)
        self._records = self._open_shards()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Read a clip: `latents` float32 [T, h, w, C], `text` float32 [text_len, text_dim]."""
        try:
            return self.manifest.unpack(self._records[index])
        except (RuntimeError, ValueError) as error:
            raise damaged_error(self._shard_of(index), f"record {index}: {error}") from None

    def _open_shards(self) -> ArrayRecordDataSource:
        faults = shard_faults(self._folder, self.manifest)
        if faults:
            raise faults[0]
        paths = [str(self._folder / shard.name) for shard in self.manifest.shards]
        try:
            records = ArrayRecordDataSource(paths)
            count = len(records)
        except RuntimeError as error:
            raise damaged_error(self._folder, error) from None
        if count != self.manifest.count:
            raise damaged_error(self._folder, f"{count} records instead of {self.manifest.count}")
        return records

    def _shard_of(self, index: int) -> Path:
        ends = np.cumsum([shard.count for shard in self.manifest.shards])
        shard = self.manifest.shards[int(np.searchsorted(ends, index, "right"))]
        return self._folder / shard.name


class LatentSource:
    """The clips of a folder for a run; the last `data.held_out` clips are held out.

    Args:
      config: data.path, data.held_out, the codec and the shapes of the model and of the data are
        read.

    Raises:
      DataError: a file is missing or damaged.
      ConfigError: the shapes or the codec differ from the configuration's, or `data.held_out`
        leaves no training clip.
    """

    def __init__(self, config: Config):
        self.folder = LatentFolder(config.data.path)
        _compare(self.folder.manifest, config)
        self._training = len(self.folder) - config.data.held_out
        if self._training < 1:
            raise ConfigError(
                f"leaves none of the {len(self.folder)} clips in data.path={config.data.path} "
                "for training",
                field="data.held_out",
                value=config.data.held_out,
                remedy="lower it",
            )

    def __len__(self) -> int:
        return self._training

    def training(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Read a clip: `latents` float32 [T, h, w, C], `text` float32 [text_len, text_dim]."""
        del rng
        return self.folder[index]

    def held_out(self, index: int) -> dict[str, np.ndarray]:
        """Read held-out clip `index`, with the same keys."""
        return self.folder[self._training + index]


def shard_faults(folder: Path, manifest: Manifest, *, contents: bool = False) -> list[DataError]:
    """Return an error for each file of a folder that is missing, has another size, or changed.

    Args:
      folder: the folder.
      manifest: its manifest.
      contents: whether to also read the files and compare their SHA-256.
    """
    faults = []
    for shard in manifest.shards:
        path = folder / shard.name
        if not path.is_file():
            faults.append(
                DataError(
                    f"{path} is missing, but {MANIFEST} lists it",
                    remedy="copy it there again, or write the folder again",
                )
            )
        elif path.stat().st_size != shard.bytes:
            faults.append(
                damaged_error(path, f"{path.stat().st_size} bytes instead of {shard.bytes}")
            )
        elif contents and sha256(path) != shard.sha256:
            faults.append(damaged_error(path, "its SHA-256 is not the manifest's"))
    return faults


class Check(NamedTuple):
    """Result of `check_latents`.

    Attributes:
      manifest: the folder's manifest.
      problems: one line each; empty if there are none.
      mean, std: of the latents, per channel, float64 [C].
      text_rows: mean number of used text slots.
    """

    manifest: Manifest
    problems: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    text_rows: float


def check_latents(path: str | Path) -> Check:
    """Read and check every clip of a folder of stored latents, from any program.

    Clips are read only if all files match the manifest.

    Raises:
      DataError: there is no readable manifest, or no clip.
    """
    manifest = read_manifest(Path(path) / MANIFEST)
    nothing = np.zeros(manifest.latent_shape[-1])
    problems = [str(fault) for fault in shard_faults(Path(path), manifest, contents=True)]
    if problems:
        return Check(manifest, tuple(problems), nothing, nothing, 0.0)
    folder = LatentFolder(path)
    sums, rows = np.zeros((2, manifest.latent_shape[-1])), 0
    for index in range(len(folder)):
        try:
            clip = folder[index]
        except DataError as error:
            problems.append(str(error))
            continue
        bad = [name for name, values in clip.items() if not np.isfinite(values).all()]
        if bad:
            problems.append(f"clip {index}: {' and '.join(bad)} with values that are not finite")
            continue
        values = clip["latents"].astype(np.float64)
        sums += [values.mean((0, 1, 2)), np.square(values).mean((0, 1, 2))]
        rows += int(np.any(clip["text"] != 0, axis=-1).sum())
    mean, square = sums / max(len(folder) - len(problems), 1)
    size = float(np.sqrt(np.mean(square)))
    if not problems and not 0.1 < size < 10:
        problems.append(
            f"the latents' root mean square is {size:.3g}; normalized ones have about 1"
        )
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return Check(manifest, tuple(problems), mean, std, rows / len(folder))


def _compare(manifest: Manifest, config: Config) -> None:
    model, data = config.model, config.data
    refuse = lambda problem, remedy: ConfigError(
        problem, field="data.path", value=data.path, remedy=remedy
    )
    for key, expected, fields in (
        (
            "latent_shape",
            (data.frames, *config.latent_shape),
            "data.frames, data.height, data.width, data.codec_factor and model.in_dim",
        ),
        ("text_shape", (model.text_len, model.text_dim), "model.text_len and model.text_dim"),
    ):
        found = getattr(manifest, key)
        if found != expected:
            raise refuse(
                f"has {key}={found}, but {fields} give {expected}",
                "change them or store the latents again",
            )
    if manifest.codec["name"] != data.codec:
        raise refuse(
            f"has latents of the codec {manifest.codec['name']}, but data.codec={data.codec}",
            "change it or store the latents again",
        )
    if data.vae and manifest.codec.get("weights"):
        ours = fingerprint(vae_weights(data.vae))
        if ours != manifest.codec["weights"]:
            raise refuse(
                f"has latents of other weights of the VAE than data.vae={data.vae}",
                "name those weights or store the latents again",
            )
