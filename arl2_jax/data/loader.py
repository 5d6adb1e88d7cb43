"""Batches of training and held-out clips, from any source."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import grain
import jax
import numpy as np
from absl import flags

from arl2_jax.codecs import Codec, make_codec
from arl2_jax.config import Config, short_run
from arl2_jax.data import sprites
from arl2_jax.data.latents import LatentSource
from arl2_jax.data.sprite_clips import SpriteClips
from arl2_jax.data.videos import VideoClips
from arl2_jax.errors import ConfigError, UserError
from arl2_jax.text import embed_caption

# Endless in practice; the length of an infinite order overflows at batches of one clip.
_EPOCHS = 2**30

Example = Mapping[str, np.ndarray]


@runtime_checkable
class Clips(Protocol):
    """Clips by index, cut from the training or from the held-out part of a source."""

    def __len__(self) -> int:
        """Return the number of training clips in an epoch."""
        ...

    def training(self, index: int, rng: np.random.Generator) -> Example:
        """Return one training example; `rng` draws all that is random about it."""
        ...

    def held_out(self, index: int) -> Example:
        """Return one of the `data.held_out` examples that are never trained on."""
        ...


@runtime_checkable
class PixelClips(Protocol):
    """Like `Clips`, but as videos uint8 [F, H, W, 3] with captions."""

    def __len__(self) -> int: ...

    def training(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """Return one training clip."""
        ...

    def held_out(self, index: int) -> tuple[np.ndarray, str]:
        """Return one held-out clip."""
        ...


@dataclasses.dataclass(frozen=True)
class EncodedClips:
    """Pixel clips, encoded: `latents` float32 [T, h, w, C], `text` float32 [text_len, text_dim]."""

    clips: PixelClips
    codec: Codec
    text_len: int
    text_dim: int

    def __len__(self) -> int:
        return len(self.clips)

    def training(self, index: int, rng: np.random.Generator) -> Example:
        """Encode a training clip."""
        return self._encode(*self.clips.training(index, rng))

    def held_out(self, index: int) -> Example:
        """Encode a held-out clip."""
        return self._encode(*self.clips.held_out(index))

    def _encode(self, video: np.ndarray, caption: str) -> Example:
        pixels = video.astype(np.float32) / 127.5 - 1
        latents = np.asarray(self.codec.encode(pixels[None])[0], np.float32)
        return {"latents": latents, "text": embed_caption(caption, self.text_len, self.text_dim)}


@dataclasses.dataclass(frozen=True)
class FirstFrames:
    """The first `frames` latent frames of other clips."""

    clips: Clips
    frames: int

    def __len__(self) -> int:
        return len(self.clips)

    def training(self, index: int, rng: np.random.Generator) -> Example:
        """Cut a training clip."""
        return self._cut(self.clips.training(index, rng))

    def held_out(self, index: int) -> Example:
        """Cut a held-out clip."""
        return self._cut(self.clips.held_out(index))

    def _cut(self, example: Example) -> Example:
        return {**example, "latents": example["latents"][: self.frames]}


@dataclasses.dataclass(frozen=True)
class ClipData:
    """The clips of a run.

    Attributes:
      codec: codec of their latents; None if its weights are not known.
      clips: the source.
      config: the run's configuration.
    """

    codec: Codec | None
    clips: Clips
    config: Config

    def train_batches(self, batch_size: int, seed: int) -> grain.DatasetIterator:
        """Return endless shuffled batches of training clips.

        Args:
          batch_size: clips in a batch over all processes; each process gets an equal part.
          seed: seed of the order and of all that is random about a clip.

        Returns:
          An iterator of {"latents": float32 [b, T, h, w, C], "text": float32 [b, text_len,
          text_dim]} with b = batch_size / processes. `get_state()` is a JSON-serializable dict;
          `set_state(state)` restores the position. A state is only valid for the same seed, batch
          size, number of processes and `data.workers`.

        Raises:
          ConfigError: the batch size is no multiple of the number of processes.
        """
        process, processes = jax.process_index(), jax.process_count()
        if batch_size % processes:
            raise ConfigError(
                f"must be a multiple of the {processes} processes",
                field="batch_size",
                value=batch_size,
            )
        seed %= 2**32
        order = grain.MapDataset.range(len(self.clips)).seed(seed).shuffle().repeat(_EPOCHS)
        examples = order.map_with_index(_Draw(self.clips, seed))
        share = examples[process::processes].batch(batch_size // processes)
        workers = self.config.data.workers
        if not workers:
            # One thread prefetches while the device is busy.
            ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
            return iter(share.to_iter_dataset(ahead))
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's workers read flags, even outside app.run
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        return iter(share.to_iter_dataset(ahead).mp_prefetch(options))

    def held_out(self, count: int) -> dict[str, np.ndarray]:
        """Return the first `count` held-out clips as one batch, the same on every process.

        Raises:
          ConfigError: more than `data.held_out`.
        """
        available = self.config.data.held_out
        if count > available:
            raise ConfigError(
                f"is fewer than {count} clips",
                field="data.held_out",
                value=available,
                remedy="raise it",
            )
        examples = [self.clips.held_out(index) for index in range(count)]
        return {name: np.stack([e[name] for e in examples]) for name in ("latents", "text")}


@dataclasses.dataclass(frozen=True)
class _Draw:
    """Makes a training example from its place in the order and its index."""

    clips: Clips
    seed: int

    def __call__(self, place: int, index: int) -> Example:
        return self.clips.training(int(index), np.random.default_rng((self.seed, place)))


def open_short_data(config: Config, phase: str) -> ClipData:
    """Open the short clips that a phase begins with; their `config` is that of `short_run`.

    Raises:
      ConfigError, DataError: as in `open_data`, for the short clips.
    """
    short = short_run(config, phase)
    if config.data.source != "latents":
        try:
            return open_data(short)
        except UserError as error:
            raise type(error)(f"sets short clips: {error}", field="data.short") from None
    whole = open_data(config)
    return ClipData(whole.codec, FirstFrames(whole.clips, short.data.frames), short)


def open_data(config: Config) -> ClipData:
    """Open the source that `config.data` names, and check that it fits the configuration.

    Raises:
      ConfigError: a setting does not fit the data.
      DataError: data are missing or damaged.
    """
    data, model = config.data, config.model
    if config.evaluation.clips > data.held_out:
        raise ConfigError(
            f"is more than data.held_out={data.held_out}",
            field="evaluation.clips",
            value=config.evaluation.clips,
            remedy="lower it or hold out more",
        )
    codec = make_codec(config)
    if data.source == "latents":
        return ClipData(codec, LatentSource(config), config)
    assert codec is not None  # the codec of pixel clips needs no weights
    frames = codec.pixel_frames(data.frames)
    if data.source == "synthetic":
        sprites.check(config)
        block = codec.pixel_frames(model.frames_per_block)
        pixel_clips = SpriteClips(dataclasses.replace(data, frames=frames), block)
        if data.sprites.only_reveals:
            pixel_clips.held_out(0)  # raises if there are no such clips
    else:
        pixel_clips = VideoClips(data, frames)
    clips = EncodedClips(pixel_clips, codec, model.text_len, model.text_dim)
    return ClipData(codec, clips, config)
