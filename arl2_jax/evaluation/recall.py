"""The recall test: is a hidden sprite drawn with its own identity when it comes out?"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from arl2_jax.codecs import Codec
from arl2_jax.config import Config, SpriteConfig
from arl2_jax.data.reveals import Reveal, reveal_clips
from arl2_jax.data.sprites import BACKGROUNDS, SpriteClip, draw_sprite
from arl2_jax.text import embed_caption

# Color and shape of a drawing that is nearer to the bare background than to any sprite.
NOTHING = -1
# Quantile of the standard normal distribution, for 95 % intervals.
_QUANTILE = 1.959964


class RecallTest(NamedTuple):
    """Held-out clips in which a hidden sprite comes out again.

    Attributes:
      clips: N clips; neighbors are twins, equal but for the identity of the revealed sprite.
      events: the reveal of each.
      batch: inputs of a model, "latents" and "text".
    """

    clips: list[SpriteClip]
    events: list[Reveal]
    batch: dict[str, np.ndarray]

    @property
    def identities(self) -> Int[np.ndarray, "clips 2"]:
        """Return color and shape of every revealed sprite."""
        pairs = zip(self.clips, self.events, strict=True)
        return np.array([(c.colors[e.sprite], c.shapes[e.sprite]) for c, e in pairs])

    @property
    def lags(self) -> Int[np.ndarray, "clips"]:
        """Return the number of frame blocks for which each sprite was hidden."""
        return np.array([event.lag for event in self.events])


def recall_test(config: Config, codec: Codec) -> RecallTest:
    """Make the clips of the recall test.

    Raises:
      ConfigError: reveals are too rare for config.evaluation.recall_clips.
    """
    clips, events = reveal_clips(config, config.evaluation.recall_clips)
    pixels = np.stack([clip.video for clip in clips]).astype(np.float32) / 127.5 - 1
    model = config.model
    text = [embed_caption(clip.caption, model.text_len, model.text_dim) for clip in clips]
    return RecallTest(clips, events, {"latents": codec.encode(pixels), "text": np.stack(text)})


def read_drawings(
    pixels: Float[np.ndarray, "*drawings clips frames height width 3"],
    test: RecallTest,
    config: Config,
) -> Int[np.ndarray, "*drawings clips 2"]:
    """Read the sprite in drawings of the frame block in which each clip's sprite comes out.

    Args:
      pixels: the drawn block of every clip, in [-1, 1]; leading axes are kept.
      test: the clips.
      config: the run; its sprites give the identities to choose from.

    Returns:
      Color and shape of the nearest sprite to each drawing, or `NOTHING` for both.
    """
    sprites, size = config.data.sprites, config.data.sprites.size
    found = []
    for i, (clip, event) in enumerate(zip(test.clips, test.events, strict=True)):
        row, column = clip.positions[event.frame, event.sprite].astype(int)
        frame = event.frame - event.block * config.model.frames_per_block
        crops = pixels[..., i, frame, row : row + size, column : column + size, :]
        found.append(read_sprites(crops, clip.background, sprites))
    return np.stack(found, axis=-2)


def read_sprites(
    crops: Float[np.ndarray, "*drawings size size 3"], background: int, sprites: SpriteConfig
) -> Int[np.ndarray, "*drawings 2"]:
    """Return the color and shape nearest to each crop; `NOTHING` if the background is nearest.

    Args:
      crops: bounding boxes of a sprite, in [-1, 1].
      background: index of the clip's background.
      sprites: numbers of colors and shapes to choose from, and the size of sprites.
    """
    templates, identities = _templates(background, sprites.colors, sprites.shapes, sprites.size)
    distances = [np.mean((crops - drawing) ** 2, axis=(-3, -2, -1)) for drawing in templates]
    return identities[np.argmin(distances, axis=0)]


@functools.cache
def _templates(background: int, colors: int, shapes: int, size: int):
    """Draw all answers [1 + colors x shapes, size, size, 3]: (drawings, identities).

    The first has no sprite, so that a faint smear is not read as the smallest sprite.
    """
    tone = np.array(list(BACKGROUNDS.values())[background])
    drawings, identities = [np.broadcast_to(tone, (size, size, 3))], [(NOTHING, NOTHING)]
    for color, shape in itertools.product(range(colors), range(shapes)):
        rgb, mask = draw_sprite(shape, color, size)
        drawings.append(np.where(mask[..., None], rgb, tone))
        identities.append((color, shape))
    return np.stack(drawings) / 127.5 - 1, np.array(identities)


def recall(
    readings: Int[np.ndarray, "drawings clips 2"], identities: Int[np.ndarray, "clips 2"]
) -> dict[str, float | list[float]]:
    """Compute the shares of revealed sprites drawn right, means over K drawings of each clip.

    Returns:
      "recall" (color and shape both right), "color", "shape", and the "interval" of recall.
    """
    right = readings == identities
    both = right.all(axis=-1)
    return {
        "recall": float(both.mean()),
        "color": float(right[..., 0].mean()),
        "shape": float(right[..., 1].mean()),
        "interval": wilson(float(both.mean()), both.shape[-1]),
    }


def recall_by_lag(
    right: Bool[np.ndarray, "drawings clips"], lags: Int[np.ndarray, "clips"]
) -> dict[int, dict[str, float | int | list[float]]]:
    """Compute recall for each lag: lag -> "recall", its "interval", and "clips"."""
    found = {}
    for lag in np.unique(lags).tolist():
        own = right[:, lags == lag]
        share = float(own.mean())
        found[lag] = {
            "recall": share,
            "interval": wilson(share, own.shape[1]),
            "clips": own.shape[1],
        }
    return found


def best_blind_answer(identities: Int[np.ndarray, "clips 2"]) -> float:
    """Return the largest recall of any constant answer on these clips."""
    return float(np.unique(identities, axis=0, return_counts=True)[1].max() / len(identities))


def wilson(share: float, clips: int) -> list[float]:
    """Compute Wilson's 95 % interval of a share: [low, high].

    Args:
      share: in [0, 1]; the mean over the drawings of each clip, if there are several.
      clips: number of clips, not of drawings: two drawings of one clip are not independent.
    """
    z2 = _QUANTILE**2 / clips
    middle = (share + z2 / 2) / (1 + z2)
    half = np.sqrt(z2 * (share * (1 - share) + z2 / 4)) / (1 + z2)
    return [max(float(middle - half), 0.0), min(float(middle + half), 1.0)]
