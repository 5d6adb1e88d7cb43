"""Procedural videos with ground truth: sprites move, bounce, and pass behind occluders.

Neither the frames in which a sprite is hidden nor captions show what it looks like: to draw it
when it comes out, a model must have remembered it. A lamp on the occluder may show when and where
it comes out.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from arl2_jax.config import Config, DataConfig, SpriteConfig
from arl2_jax.data.motion import move, place_occluders
from arl2_jax.errors import ConfigError

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 220, 0),
    "blue": (0, 64, 255),
    "yellow": (255, 240, 0),
    "magenta": (255, 0, 255),
    "cyan": (0, 240, 255),
    "orange": (255, 128, 0),
    "violet": (128, 0, 255),
}
SHAPES = ("square", "triangle", "cross", "disc", "box")
# No names of `COLORS`: a caption must not have a word that could describe a sprite.
BACKGROUNDS = {
    "black": (8, 8, 8),
    "navy": (8, 12, 48),
    "maroon": (44, 8, 14),
    "forest": (8, 36, 14),
}
OCCLUDER_COLOR = (128, 128, 128)
# Of the lamp on an occluder.
LAMP_COLOR = (255, 255, 255)
# Training seeds are below, held-out seeds from here on.
HELD_OUT_SEED = 2**62
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class SpriteClip(NamedTuple):
    """A clip of F pixel frames with S sprites and O occluders, and its ground truth.

    Attributes:
      video: uint8 [F, H, W, 3].
      positions: float32 [F, S, 2], row and column of the top left corner of each bounding box, as
        drawn: whole pixels, never outside the frame.
      colors: int64 [S], indices of `COLORS`.
      shapes: int64 [S], indices of `SHAPES`.
      visible: float32 [F, S], share of a sprite's own pixels that neither an occluder nor another
        sprite hides.
      occluders: int64 [O, 4], boxes (top, left, bottom, right), the last two exclusive.
      caption: number of sprites and background; nothing that a model should remember.
      background: index of `BACKGROUNDS`.
      lamps: int64 [F, S, 4], boxes (top, left, bottom, right) of the lamps on occluders that are
        lit because a sprite is about to come out there; zeros where none is.
    """

    video: np.ndarray
    positions: np.ndarray
    colors: np.ndarray
    shapes: np.ndarray
    visible: np.ndarray
    occluders: np.ndarray
    caption: str
    background: int
    lamps: np.ndarray


def draw_sprite(shape: int, color: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw a sprite.

    Args:
      shape: index of `SHAPES`.
      color: index of `COLORS`.
      size: side of the bounding box in pixels.

    Returns:
      rgb uint8 [size, size, 3], zero outside the sprite; mask bool [size, size].
    """
    mask = _mask(shape, size).copy()
    return mask[..., None] * _palette(0)[color], mask


def make_clip(
    sprites: SpriteConfig,
    data: DataConfig,
    seed: int,
    identity: Sequence[tuple[int, int]] | None = None,
) -> SpriteClip:
    """Make one clip of `data.frames` pixel frames; a pure function of its arguments.

    Args:
      sprites: what moves.
      data: frames, height and width; nothing else is read.
      seed: not negative.
      identity: color and shape of every sprite instead of those drawn by the seed; all else stays
        the same.

    Raises:
      ValueError: another number of identities than of sprites.
    """
    rng = np.random.default_rng(seed)
    count = int(rng.integers(sprites.count[0], sprites.count[1], endpoint=True))
    shapes = rng.integers(sprites.shapes, size=count)
    colors = rng.integers(sprites.colors, size=count)
    if identity is not None:
        if len(identity) != count:
            raise ValueError(f"{len(identity)} identities are given to a clip of {count} sprites")
        colors, shapes = np.array(identity, np.int64).reshape(count, 2).T
    background = int(rng.integers(len(BACKGROUNDS)))
    occluders = place_occluders(rng, sprites, data)
    corners, lamps = move(rng, sprites, data, count, occluders)
    video, visible = _draw(corners, shapes, colors, occluders, lamps, background, sprites, data)
    number = _NUMBERS[count - 1] if count <= len(_NUMBERS) else str(count)
    tone = list(BACKGROUNDS)[background]
    caption = f"{number} {'sprite' if count == 1 else 'sprites'} on a {tone} background"
    positions = corners.astype(np.float32)
    return SpriteClip(
        video, positions, colors, shapes, visible, occluders, caption, background, lamps
    )


def check(config: Config) -> None:
    """Check that sprites, lanes and occluders fit the frame and that occluders hide for long.

    Raises:
      ConfigError: one line naming the field and the remedy.
    """
    data, sprites = config.data, config.data.sprites
    lane = data.height if sprites.vertical else data.height // sprites.count[1]
    if sprites.size > lane:
        raise ConfigError(
            f"is taller than the {lane} rows that a sprite has",
            field="data.sprites.size",
            value=sprites.size,
            remedy="lower data.sprites.size or data.sprites.count, or raise data.height",
        )
    if sprites.size > data.width:
        raise ConfigError(
            f"is wider than data.width={data.width}",
            field="data.sprites.size",
            value=sprites.size,
            remedy="lower it",
        )
    masks = [_mask(shape, sprites.size) for shape in range(sprites.shapes)]
    if any(np.array_equal(a, b) for a, b in itertools.combinations(masks, 2)):
        raise ConfigError(
            f"draws two of the {sprites.shapes} shapes alike",
            field="data.sprites.size",
            value=sprites.size,
            remedy="raise it to 5 or lower data.sprites.shapes",
        )
    if sprites.occluders:
        _check_occluders(config)
        _check_pause(config)
    elif sprites.pause[1] or sprites.lamp:
        raise ConfigError(
            f"and data.sprites.lamp={sprites.lamp} need an occluder, but data.sprites.occluders=0",
            field="data.sprites.pause",
            value=sprites.pause,
            remedy="raise it or set both to 0",
        )


def _check_occluders(config: Config) -> None:
    data, sprites = config.data, config.data.sprites
    needed = sprites.occluders * (sprites.occluder_width + sprites.size) + sprites.size
    if needed > data.width:
        raise ConfigError(
            f"with room for a sprite on each side needs {needed} columns, but "
            f"data.width={data.width}",
            field="data.sprites.occluder_width",
            value=sprites.occluder_width,
            remedy="lower it or data.sprites.occluders",
        )
    # A sprite is hidden at this many places in a row, and passes `speed` of them a frame.
    places = max(sprites.occluder_width - sprites.size + 1, 0)
    hidden = int(places / sprites.speed[1]) + sprites.pause[0]
    block = config.model.frames_per_block
    if hidden <= block:
        raise ConfigError(
            f"hides the fastest sprite for {hidden} frames, not longer than "
            f"model.frames_per_block={block}",
            field="data.sprites.occluder_width",
            value=sprites.occluder_width,
            remedy="raise it to at least "
            f"{int(np.ceil((block + 1) * sprites.speed[1])) + sprites.size - 1} or lower "
            "data.sprites.speed",
        )


def _check_pause(config: Config) -> None:
    """Check that the shortest pause leaves the fastest sprite time to come out again."""
    data, sprites = config.data, config.data.sprites
    if not sprites.pause[1]:
        return
    passing = math.ceil((sprites.occluder_width + sprites.size) / sprites.speed[1])
    most, block = data.frames - 1 - passing, config.model.frames_per_block
    if sprites.pause[0] > most:
        needed = block * math.ceil((passing + sprites.pause[0] + 1) / block)
        lower = f"lower it to at most {most} or " if most >= 0 else ""
        raise ConfigError(
            f"lets no sprite come out again within data.frames={data.frames}",
            field="data.sprites.pause",
            value=sprites.pause,
            remedy=f"{lower}raise data.frames to at least {needed}",
        )


def _draw(
    corners: np.ndarray,
    shapes: np.ndarray,
    colors: np.ndarray,
    occluders: np.ndarray,
    lamps: np.ndarray,
    background: int,
    sprites: SpriteConfig,
    data: DataConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Paint back to front; return the video and each sprite's visible share [F, S]."""
    count, frames = len(shapes), np.arange(len(corners))[:, None]
    owner = np.full((len(corners), data.height, data.width), count, np.uint8)
    pixels = []
    for sprite, shape in enumerate(shapes.tolist()):
        rows, columns = np.nonzero(_mask(shape, sprites.size))
        place = (frames, corners[:, sprite, :1] + rows, corners[:, sprite, 1:] + columns)
        owner[place] = sprite
        pixels.append(place)
    for top, left, bottom, right in occluders:
        owner[:, top:bottom, left:right] = count + 1
    for frame, sprite in np.argwhere(lamps.any(-1)):
        top, left, bottom, right = lamps[frame, sprite]
        owner[frame, top:bottom, left:right] = count + 2
    visible = [(owner[place] == sprite).mean(1) for sprite, place in enumerate(pixels)]
    palette = _palette(background)
    tones = palette[np.append(colors, len(COLORS) + np.arange(3))]
    return tones[owner], np.stack(visible, 1).astype(np.float32)


@functools.cache
def _palette(background: int) -> np.ndarray:
    """Return the colors of sprites, background, occluder and lamp: uint8 [8 + 3, 3]."""
    tones = [*COLORS.values(), list(BACKGROUNDS.values())[background], OCCLUDER_COLOR, LAMP_COLOR]
    return np.array(tones, np.uint8)


@functools.cache
def _mask(shape: int, size: int) -> np.ndarray:
    """Return a mask [size, size]; every shape touches all four sides of its bounding box."""
    half = size / 2
    y, x = np.mgrid[:size, :size] - (size - 1) / 2
    match SHAPES[shape]:
        case "square":
            mask = np.ones((size, size), bool)
        case "triangle":
            mask = abs(x) <= (y + half + 0.5) / 2
        case "cross":
            mask = np.minimum(abs(x), abs(y)) <= max(size / 10, 0.5)
        case "disc":
            mask = x**2 + y**2 <= half**2
        case "box":
            mask = np.maximum(abs(x), abs(y)) > half - max(size / 7, 1)
        case name:
            raise ValueError(f"no such shape: {name}")
    mask.setflags(write=False)
    return mask
