"""Reads which sprite a video shows in every lane, at any position in the lane."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from arl2_jax.config import SpriteConfig
from arl2_jax.data.sprites import BACKGROUNDS, SpriteClip, draw_sprite
from arl2_jax.evaluation.recall import NOTHING

# The reading of a lane whose sprite is partly visible: a part does not always show what it is.
PARTLY = -2

AnyArray = Array | np.ndarray


class Lanes(NamedTuple):
    """Constants of videos whose sprites keep to their lanes.

    Attributes:
      rows: top row of each of S lanes in N videos.
      identities: color x number of shapes + shape of the true sprite; `NOTHING` where a video has
        fewer than S sprites.
      backgrounds: index of `BACKGROUNDS`.
      covered: columns behind an occluder.
    """

    rows: Int[AnyArray, "clips lanes"]
    identities: Int[AnyArray, "clips lanes"]
    backgrounds: Int[AnyArray, "clips"]
    covered: Bool[AnyArray, "clips width"]


def lanes_of(clips: Sequence[SpriteClip], sprites: SpriteConfig) -> Lanes:
    """Return the lanes of clips.

    Raises:
      ValueError: sprites move up and down, so that they have no lanes.
    """
    if sprites.vertical:
        raise ValueError("data.sprites.vertical=True: sprites that move up and down have no lanes")
    shape = len(clips), sprites.count[1]
    rows, identities = np.zeros(shape, np.int32), np.full(shape, NOTHING, np.int32)
    covered = np.zeros((len(clips), clips[0].video.shape[2]), bool)
    for i, clip in enumerate(clips):
        count = len(clip.colors)
        rows[i, :count] = clip.positions[0, :, 0]
        identities[i, :count] = clip.colors * sprites.shapes + clip.shapes
        for _, left, _, right in clip.occluders:
            covered[i, left:right] = True
    backgrounds = np.array([clip.background for clip in clips], np.int32)
    return Lanes(rows, identities, backgrounds, covered)


@functools.partial(jax.jit, static_argnames="sprites")
def read_lanes(
    pixels: Float[Array, "clips frames height width 3"], lanes: Lanes, sprites: SpriteConfig
) -> Int[Array, "clips lanes"]:
    """Read the sprite that each lane of a frame block shows.

    Every identity at every column of the lane is compared with the bare background, over the
    columns that no occluder covers, and the best is read, from the frame of the block that shows a
    whole sprite most clearly.

    Args:
      pixels: frames of a block, in [-1, 1].
      lanes: lanes of the videos.
      sprites: numbers of colors and shapes to choose from, and the size of sprites.

    Returns:
      Identities as in `Lanes`; `NOTHING` where all frames are nearest to the background, `PARTLY`
      where a sprite is seen, but whole in no frame.
    """
    drawings, tones = (jnp.asarray(x, jnp.float32) for x in _templates(sprites))

    def read(frames, row, background, covered):
        strips = jax.lax.dynamic_slice_in_dim(frames, row, sprites.size, axis=1)
        return _read_strips(strips, drawings[background], tones[background], ~covered)

    of_video = jax.vmap(read, in_axes=(None, 0, None, None))
    return jax.vmap(of_video)(pixels, lanes.rows, lanes.backgrounds, lanes.covered)


def _read_strips(
    strips: Float[Array, "frames size width 3"],
    drawings: Float[Array, "identities size size 3"],
    tone: Float[Array, "3"],
    seen: Bool[Array, "width"],
) -> Int[Array, ""]:
    """Read one lane in a block."""
    size, width = drawings.shape[1], strips.shape[2]
    places = width - size + 1
    # |x - drawing|^2 - |x - background|^2 for every column of the strip and of the drawing.
    difference = drawings - tone
    squares = jnp.sum(drawings**2 - tone**2, axis=(1, 3))
    columns = jnp.einsum("frwc,irjc->fiwj", strips, difference, precision="highest")
    gains = (squares[None, :, None] - 2 * columns) * seen[:, None]
    # The same for the whole drawing, at each place of the strip.
    errors = jnp.sum(
        jnp.stack([gains[:, :, j : j + places, j] for j in range(size)]), axis=0
    ).reshape(len(strips), -1)
    whole = jnp.stack([seen[j : j + places] for j in range(size)]).all(axis=0)
    best, least = jnp.argmin(errors, axis=1), jnp.min(errors, axis=1)
    identity, place = best // places, best % places
    clear = (least < 0) & whole[place]
    frame = jnp.argmin(jnp.where(clear, least, 0))
    shown = jnp.where((least < 0).any(), PARTLY, NOTHING)
    return jnp.where(clear.any(), identity[frame], shown).astype(jnp.int32)


@functools.cache
def _templates(sprites: SpriteConfig) -> tuple[np.ndarray, np.ndarray]:
    """Draw sprites [backgrounds, identities, size, size, 3], with tones [backgrounds, 3]."""
    tones = np.array(list(BACKGROUNDS.values()), np.float32)
    pairs = itertools.product(range(sprites.colors), range(sprites.shapes))
    drawn = [draw_sprite(shape, color, sprites.size) for color, shape in pairs]
    on = lambda tone: [np.where(mask[..., None], rgb, tone) for rgb, mask in drawn]
    drawings = np.array([on(tone) for tone in tones], np.float32)
    return drawings / 127.5 - 1, tones / 127.5 - 1
