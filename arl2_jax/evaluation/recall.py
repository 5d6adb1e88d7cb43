"""The recall test: is a sprite that was hidden drawn again as it was?"""

import itertools
from collections.abc import Callable

import jax
import numpy as np

from arl2_jax.config import Config
from arl2_jax.data.codec import Codec
from arl2_jax.data.sprites import (
    BACKGROUNDS,
    Reveal,
    SpriteClip,
    draw_sprite,
    reveal_clips,
)
from arl2_jax.data.text import embed_caption

Generate = Callable[[jax.Array, jax.Array], jax.Array]


def read_sprite(
    crop: np.ndarray, background: int, colors: int, shapes: int
) -> tuple[int, int] | None:
    """The (color, shape) whose drawing is nearest to a crop; None if the bare background is.

    Args:
      crop: float [size, size, 3] in [-1, 1], the bounding box of a sprite.
      background: index of the clip's background.
      colors, shapes: how many of each there are to choose from.
    """
    size = crop.shape[0]
    tone = np.array(list(BACKGROUNDS.values())[background])
    distance = lambda drawing: np.mean((crop - (drawing / 127.5 - 1)) ** 2)
    # Nothing is one of the readings, so that a faint smear is not taken for the smallest sprite.
    nearest, found = distance(tone), None
    for color, shape in itertools.product(range(colors), range(shapes)):
        rgb, mask = draw_sprite(shape, color, size)
        error = distance(np.where(mask[..., None], rgb, tone))
        if error < nearest:
            nearest, found = error, (color, shape)
    return found


def recall_clips(config: Config, codec: Codec) -> tuple[list[SpriteClip], list[Reveal], dict]:
    """Held-out clips with a reveal each, and the batch that a model is given of them."""
    clips, events = reveal_clips(config, config.evaluation.recall_clips)
    pixels = np.stack([clip.video for clip in clips]).astype(np.float32) / 127.5 - 1
    model = config.model
    text = [embed_caption(clip.caption, model.text_len, model.text_dim) for clip in clips]
    return clips, events, {"latents": codec.encode(pixels), "text": np.stack(text)}


def recall(
    generated: np.ndarray, clips: list[SpriteClip], events: list[Reveal], config: Config
) -> dict[str, float]:
    """Shares of revealed sprites that were drawn right.

    Args:
      generated: pixels [B, F, H, W, 3] in [-1, 1]; every block made from noise after its clean
        past.
      clips, events: the clips and the reveal to read in each.
      config: the run; its sprites say what there is to choose from.

    Returns:
      "recall" (colour and shape both right), "color", "shape", and "chance": the recall of drawing
      any of the sprites at random.
    """
    sprites = config.data.sprites
    right = []
    for video, clip, event in zip(generated, clips, events, strict=True):
        row, column = clip.positions[event.frame, event.sprite].astype(int)
        crop = video[event.frame, row : row + sprites.size, column : column + sprites.size]
        found = read_sprite(crop, clip.background, sprites.colors, sprites.shapes)
        color, shape = found or (None, None)
        right.append((color == clip.colors[event.sprite], shape == clip.shapes[event.sprite]))
    both = np.array(right)
    return {
        "recall": float(both.all(axis=1).mean()),
        "color": float(both[:, 0].mean()),
        "shape": float(both[:, 1].mean()),
        "chance": 1 / (sprites.colors * sprites.shapes),
    }
