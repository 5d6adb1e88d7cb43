"""The moments at which a model must draw a sprite from memory, and twin clips to test it with."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from arl2_jax.config import Config, SpriteConfig
from arl2_jax.data.sprites import HELD_OUT_SEED, SpriteClip, check, make_clip
from arl2_jax.errors import ConfigError

# Clips searched for each pair: at most, at most if enough are found, and at least (for rare lags).
_MOST_TRIES, _TRIES, _FEWEST_TRIES = 200, 20, 4


class Reveal(NamedTuple):
    """A sprite that comes out in frame block `block`, fully visible at pixel frame `frame`.

    Attributes:
      block: index of the frame block.
      sprite: index of the sprite.
      frame: the block's last frame.
      lag: whole frame blocks directly before `block` in which the sprite is not visible.
    """

    block: int
    sprite: int
    frame: int
    lag: int


def reveals(clip: SpriteClip, frames_per_block: int) -> list[Reveal]:
    """Find the moments at which a model must draw a sprite from memory.

    A sprite is revealed in frame block b (at least 2) if it is not visible in any frame of block
    b - 1, its hidden stretch there is longer than a frame block, it was fully visible in some
    frame before, and it is fully visible in the last frame of block b.

    Returns:
      Reveals in the order of their blocks, then of their sprites.
    """
    f = frames_per_block
    frames, count = clip.visible.shape
    found = []
    for block, sprite in itertools.product(range(2, frames // f), range(count)):
        visible = clip.visible[:, sprite]
        start, stop, last = (block - 1) * f, block * f, (block + 1) * f - 1
        if visible[start:stop].any() or visible[last] < 1:
            continue
        while start > 0 and visible[start - 1] == 0:
            start -= 1
        lag = (stop - start) // f
        while visible[stop] == 0:
            stop += 1
        if stop - start > f and (visible[:start] == 1).any():
            found.append(Reveal(block, sprite, last, lag))
    return found


def reveal_clips(config: Config, count: int) -> tuple[list[SpriteClip], list[Reveal]]:
    """Make held-out clips with a reveal each, in pairs of twins.

    Clips 2 i and 2 i + 1 are twins: equal bit for bit but for the revealed sprite, which differs in
    both color and shape (only in color if data.sprites.shapes is 1). Lags alternate as long as the
    clips have them; identities (color, shape) always do, in an order fixed by the pair's index.

    Args:
      config: the run.
      count: number of clips, even.

    Returns:
      The clips and the reveal of each.

    Raises:
      ConfigError: the sprites do not fit, or reveals are too rare to find that many.
      ValueError: `count` is odd.
    """
    if count % 2:
        raise ValueError(f"count={count} must be even: clips come in pairs of twins")
    check(config)
    clips: list[SpriteClip] = []
    events: list[Reveal] = []
    for seed, event in _in_turns(_candidates(config, count // 2)):
        if len(clips) == count:
            break
        pair = _twins(config, seed, event, len(clips) // 2)
        # A sprite of another shape may hide others differently.
        if all(event in reveals(clip, config.model.frames_per_block) for clip in pair):
            clips += pair
            events += [event, event]
    if len(clips) < count:
        raise ConfigError(
            f"needs {count // 2} pairs, but data.sprites gives {len(clips) // 2} clips with a "
            f"reveal in {_MOST_TRIES * count // 2}",
            field="evaluation.recall_clips",
            value=count,
            remedy="raise data.sprites.speed or data.frames, or set evaluation.recall_clips=0",
        )
    return clips, events


def _candidates(config: Config, pairs: int) -> dict[int, list[tuple[int, Reveal]]]:
    """Return lag -> seeds of held-out clips with a reveal in each; a clip has one lag."""
    found: dict[int, list[tuple[int, Reveal]]] = {}
    size = lambda event: len(found.get(event.lag, ()))
    for tried in range(_MOST_TRIES * pairs):
        enough = all(len(found[lag]) * len(found) >= pairs for lag in found)
        if tried >= _FEWEST_TRIES * pairs and found and enough:
            break
        if tried >= _TRIES * pairs and sum(map(len, found.values())) >= pairs:
            break
        seed = HELD_OUT_SEED + tried
        clip = make_clip(config.data.sprites, config.data, seed)
        if events := reveals(clip, config.model.frames_per_block):
            rarest = min(events, key=size)
            found.setdefault(rarest.lag, []).append((seed, rarest))
    return found


def _in_turns(by_lag: dict[int, list[tuple[int, Reveal]]]) -> Iterator[tuple[int, Reveal]]:
    """Yield the first of each lag, then the second of each, and so on."""
    for turn in itertools.zip_longest(*(by_lag[lag] for lag in sorted(by_lag))):
        yield from (candidate for candidate in turn if candidate is not None)


def _twins(config: Config, seed: int, event: Reveal, pair: int) -> list[SpriteClip]:
    """Return the clip of a seed twice, with two identities of its revealed sprite."""
    sprites = config.data.sprites
    drawn = make_clip(sprites, config.data, seed)
    clips = []
    for identity in _identities(sprites, pair):
        all_of = list(zip(drawn.colors.tolist(), drawn.shapes.tolist(), strict=True))
        all_of[event.sprite] = identity
        clips.append(make_clip(sprites, config.data, seed, all_of))
    return clips


def _identities(sprites: SpriteConfig, pair: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (color, shape) of a pair's clip and of its twin.

    Every run of colors x shapes pairs has each identity once on either side.
    """
    colors, shapes = sprites.colors, sprites.shapes
    cycle, place = divmod(pair, colors * shapes)
    order = np.random.default_rng(cycle).permutation(colors * shapes)
    color, shape = divmod(int(order[place]), shapes)
    other_color = (color + 1 + cycle % (colors - 1)) % colors
    other_shape = (shape + 1 + cycle % (shapes - 1)) % shapes if shapes > 1 else shape
    return (color, shape), (other_color, other_shape)
