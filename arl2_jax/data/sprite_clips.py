"""The endless source of sprite clips."""

import dataclasses

import numpy as np

from arl2_jax.config import DataConfig
from arl2_jax.data.reveals import reveals
from arl2_jax.data.sprites import HELD_OUT_SEED, SpriteClip, make_clip
from arl2_jax.errors import ConfigError

# Seeds tried for one clip, and the step between them, so that neighboring seeds share none.
_TRIES, _STRIDE = 64, 2**40


class SpriteClips:
    """One clip for each seed; training seeds are below 2^62."""

    def __init__(self, data: DataConfig, frames_per_block: int, frames: int | None = None):
        """Configure the clips.

        Args:
          data: `frames` counts pixel frames here.
          frames_per_block: pixel frames of a block, for `data.sprites.only_reveals`.
          frames: pixel frames to return, by default `data.frames`; a longer clip begins with the
            shorter one.
        """
        self._data, self._block = data, frames_per_block
        self._frames = data.frames if frames is None else frames

    def __len__(self) -> int:
        return 2**31 - 1

    def training(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """Return video uint8 [F, H, W, 3] and caption of a clip determined only by `rng`."""
        del index
        return self._clip(int(rng.integers(HELD_OUT_SEED)))

    def held_out(self, index: int) -> tuple[np.ndarray, str]:
        """Return video and caption of a held-out seed."""
        return self._clip(HELD_OUT_SEED + index)

    def _clip(self, seed: int) -> tuple[np.ndarray, str]:
        clip = None
        if self._data.sprites.only_reveals:
            seed, clip = self._with_reveal(seed)
        if clip is None or len(clip.video) != self._frames:
            data = dataclasses.replace(self._data, frames=self._frames)
            clip = make_clip(data.sprites, data, seed)
        return clip.video, clip.caption

    def _with_reveal(self, seed: int) -> tuple[int, SpriteClip]:
        """Return the first seed whose clip has a reveal, of training or held out like `seed`."""
        begin = seed // HELD_OUT_SEED * HELD_OUT_SEED
        for i in range(_TRIES):
            tried = begin + (seed - begin + i * _STRIDE) % HELD_OUT_SEED
            clip = make_clip(self._data.sprites, self._data, tried)
            if reveals(clip, self._block):
                return tried, clip
        raise ConfigError(
            f"cannot be met: {_TRIES} clips in a row have no reveal",
            field="data.sprites.only_reveals",
            value=True,
            remedy="raise data.sprites.speed or data.frames, or set it to False",
        )
