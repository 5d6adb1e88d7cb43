"""Positions of occluders, paths and pauses of sprites behind them, and lamps."""

import numpy as np

from arl2_jax.config import DataConfig, SpriteConfig

# Columns of a lamp.
LAMP_WIDTH = 2


def place_occluders(
    rng: np.random.Generator, sprites: SpriteConfig, data: DataConfig
) -> np.ndarray:
    """Place occluders of full height, with room for a sprite on each side and between them.

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
    """Move `count` sprites, each of which starts clear of the occluders.

    Returns:
      Top left corners int64 [F, S, 2] in whole pixels, and boxes int64 [F, S, 4] of the lamps that
      are lit, (top, left, bottom, right), the last two exclusive; zeros where none is.
    """
    # Lamps depend on the frames after them.
    frames = data.frames + sprites.lamp
    path = _path(rng, sprites, data, count, occluders, frames)
    if sprites.pause[1]:
        # Pauses are drawn last, so that nothing else depends on them, and passage by passage, so
        # that the beginning of a clip does not depend on its length.
        pauses = rng.integers(*sprites.pause, size=(frames, count), endpoint=True)
        path = _rest(path, pauses, occluders, sprites.size)
    lamps = _lamps(path[:frames], occluders, sprites)
    return path[: data.frames], lamps[: data.frames]


def _path(
    rng: np.random.Generator,
    sprites: SpriteConfig,
    data: DataConfig,
    count: int,
    occluders: np.ndarray,
    frames: int,
) -> np.ndarray:
    """Return the corners [frames + 1, S, 2] of sprites that never rest."""
    low, high = sprites.speed
    if float(low).is_integer() and float(high).is_integer():
        speed = rng.integers(int(low), int(high), size=count, endpoint=True).astype(float)
    else:
        speed = rng.uniform(low, high, count)
    room = np.array([data.height, data.width]) - sprites.size
    columns = np.arange(room[1] + 1)[:, None]
    clear = (columns + sprites.size <= occluders[:, 1]) | (columns >= occluders[:, 3])
    start = np.empty((count, 2), np.int64)
    start[:, 1] = rng.choice(columns[clear.all(1), 0], count)
    if sprites.vertical:
        start[:, 0] = rng.integers(room[0], size=count, endpoint=True)
        angle = rng.uniform(0, 2 * np.pi, count)
        velocity = speed[:, None] * np.stack([np.sin(angle), np.cos(angle)], -1)
    else:
        lane = data.height // sprites.count[1]
        lanes = rng.permutation(sprites.count[1])[:count]
        start[:, 0] = lanes * lane + rng.integers(lane - sprites.size, size=count, endpoint=True)
        velocity = speed[:, None] * np.stack([np.zeros(count), rng.choice((-1, 1), count)], -1)
    path = start + velocity * np.arange(frames + 1)[:, None, None]
    # Bouncing folds the straight path into [0, room].
    return np.rint(room - np.abs(path % np.maximum(2 * room, 1) - room)).astype(np.int64)


def _rest(path: np.ndarray, pauses: np.ndarray, occluders: np.ndarray, size: int) -> np.ndarray:
    """Let sprites rest on their paths: corners [F, S, 2].

    A sprite rests once in every passage: where it is wholly hidden and the next step would take it
    farther from the occluder's middle. Of two equally near places it takes the later one, so that
    it comes out soon after the pause.

    Args:
      path: corners [F + 1, S, 2] of sprites that never rest.
      pauses: frames [F, S] that a sprite rests in its first, second, ... passage.
      occluders: boxes [O, 4].
      size: side of a sprite's bounding box.
    """
    frames, count = pauses.shape
    corners = np.empty((frames, count, 2), np.int64)
    for sprite in range(count):
        waits = np.zeros(frames, np.int64)
        places = _resting_places(path[:, sprite, 1], occluders, size)
        for step, pause in zip(places, pauses[:, sprite], strict=False):
            waits[step] = pause
        # Step of the path that is seen in each frame.
        steps = np.repeat(np.arange(frames), 1 + waits)[:frames]
        corners[:, sprite] = path[steps, sprite]
    return corners


def _resting_places(columns: np.ndarray, occluders: np.ndarray, size: int) -> list[int]:
    """Return the steps of the path at which a sprite rests, from its columns [F + 1]."""
    places = []
    for _, left, _, right in occluders:
        hidden = (left <= columns[:-1]) & (columns[:-1] + size <= right)
        distance = np.abs(2 * columns + size - left - right)
        leaving = np.flatnonzero(hidden & (distance[1:] > distance[:-1]))
        passage = np.cumsum(~hidden)[leaving]
        first = np.unique(passage, return_index=True)[1]
        places += leaving[first].tolist()
    return sorted(places)


def _lamps(corners: np.ndarray, occluders: np.ndarray, sprites: SpriteConfig) -> np.ndarray:
    """Return the boxes [F, S, 4] of lit lamps; the last `lamp` frames of corners have none.

    A lamp is lit in the last `lamp` frames before a hidden sprite is seen again: two columns at the
    occluder's edge where it will come out, in its rows.
    """
    frames, count, _ = corners.shape
    lamps, size = np.zeros((frames, count, 4), np.int64), sprites.size
    for _, left, _, right in occluders if sprites.lamp else ():
        row, column = corners[..., 0], corners[..., 1]
        hidden = (left <= column) & (column + size <= right)
        for frame, sprite in np.argwhere(hidden[: frames - sprites.lamp]):
            seen = np.flatnonzero(~hidden[frame + 1 : frame + 1 + sprites.lamp, sprite])
            if len(seen):
                to_right = column[frame + 1 + seen[0], sprite] > column[frame, sprite]
                edge = right - LAMP_WIDTH if to_right else left
                top = row[frame, sprite]
                lamps[frame, sprite] = top, edge, top + size, edge + LAMP_WIDTH
    return lamps
