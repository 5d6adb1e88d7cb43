"""Where occluders stand, and how sprites move past them and rest behind them."""

import numpy as np

from arl2_jax.config import DataConfig, SpriteConfig


def place_occluders(
    rng: np.random.Generator, sprites: SpriteConfig, data: DataConfig
) -> np.ndarray:
    """Places occluders of full height, with room for a sprite beside and between them.

    Returns:
      Boxes int64 [O, 4], (top, left, bottom, right), the last two exclusive.
    """
    pitch = sprites.occluder_width + sprites.size
    slack = data.width - sprites.occluders * pitch - sprites.size
    left = np.sort(rng.integers(slack, size=sprites.occluders, endpoint=True))
    left += sprites.size + pitch * np.arange(sprites.occluders)
    boxes = np.zeros((sprites.occluders, 4), np.int64)
    boxes[:, 1], boxes[:, 2], boxes[:, 3] = left, data.height, left + sprites.occluder_width
    return boxes


def move(
    rng: np.random.Generator,
    sprites: SpriteConfig,
    data: DataConfig,
    count: int,
    occluders: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Moves `count` sprites, each of which starts beside the occluders.

    Returns:
      Top left corners int64 [F, S, 2] in whole pixels, and bool [F, O]: whether a sprite rests
      behind an occluder, that is, stands where it stood in the frame before.
    """
    path = _path(rng, sprites, data, count, occluders)
    # Drawn last, so that nothing else depends on them; passage by passage, so that the beginning
    # of a clip does not depend on its length.
    pauses = rng.integers(*sprites.pause, size=(data.frames, count), endpoint=True)
    if not sprites.pause[1]:
        return path[:-1], np.zeros((data.frames, len(occluders)), bool)
    return _rest(path, pauses, occluders, sprites.size)


def _path(
    rng: np.random.Generator,
    sprites: SpriteConfig,
    data: DataConfig,
    count: int,
    occluders: np.ndarray,
) -> np.ndarray:
    """Corners [F + 1, S, 2] of sprites that never rest."""
    low, high = sprites.speed
    if float(low).is_integer() and float(high).is_integer():
        speed = rng.integers(int(low), int(high), size=count, endpoint=True).astype(float)
    else:
        speed = rng.uniform(low, high, count)
    room = np.array([data.height, data.width]) - sprites.size
    columns = np.arange(room[1] + 1)[:, None]
    beside = (columns + sprites.size <= occluders[:, 1]) | (columns >= occluders[:, 3])
    start = np.empty((count, 2), np.int64)
    start[:, 1] = rng.choice(columns[beside.all(1), 0], count)
    if sprites.vertical:
        start[:, 0] = rng.integers(room[0], size=count, endpoint=True)
        angle = rng.uniform(0, 2 * np.pi, count)
        velocity = speed[:, None] * np.stack([np.sin(angle), np.cos(angle)], -1)
    else:
        lane = data.height // sprites.count[1]
        lanes = rng.permutation(sprites.count[1])[:count]
        start[:, 0] = lanes * lane + rng.integers(lane - sprites.size, size=count, endpoint=True)
        velocity = speed[:, None] * np.stack([np.zeros(count), rng.choice((-1, 1), count)], -1)
    path = start + velocity * np.arange(data.frames + 1)[:, None, None]
    # Bouncing folds the straight path into [0, room].
    return np.rint(room - np.abs(path % np.maximum(2 * room, 1) - room)).astype(np.int64)


def _rest(
    path: np.ndarray, pauses: np.ndarray, occluders: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lets sprites rest on their paths: (corners [F, S, 2], lit [F, O]).

    A sprite rests once in every passage: where it is wholly hidden and the next step would take it
    farther from the occluder's middle. Of two places equally near it takes the later one, which
    keeps what follows the pause short.

    Args:
      path: corners [F + 1, S, 2] of sprites that never rest.
      pauses: frames [F, S] that a sprite rests in its first, second, ... passage.
      occluders: boxes [O, 4].
      size: side of a sprite's bounding box.
    """
    frames, count = pauses.shape
    corners, lit = np.empty((frames, count, 2), np.int64), np.zeros((frames, len(occluders)), bool)
    for sprite in range(count):
        columns = path[:, sprite, 1]
        waits, behind = np.zeros(frames, np.int64), np.zeros(frames, np.int64)
        places = _resting_places(columns, occluders, size)
        for (step, occluder), pause in zip(places, pauses[:, sprite], strict=False):
            waits[step], behind[step] = pause, occluder
        # Step of the path that is seen in each frame.
        steps = np.repeat(np.arange(frames), 1 + waits)[:frames]
        corners[:, sprite] = path[steps, sprite]
        resting = 1 + np.flatnonzero(steps[1:] == steps[:-1])
        lit[resting, behind[steps[resting]]] = True
    return corners, lit


def _resting_places(columns: np.ndarray, occluders: np.ndarray, size: int) -> list[tuple[int, int]]:
    """(step of the path, occluder) of every passage, in order, from columns [F + 1]."""
    places = []
    for occluder, (_, left, _, right) in enumerate(occluders):
        hidden = (left <= columns[:-1]) & (columns[:-1] + size <= right)
        distance = np.abs(2 * columns + size - left - right)
        leaving = np.flatnonzero(hidden & (distance[1:] > distance[:-1]))
        passage = np.cumsum(~hidden)[leaving]
        first = np.unique(passage, return_index=True)[1]
        places += [(int(step), occluder) for step in leaving[first]]
    return sorted(places)
