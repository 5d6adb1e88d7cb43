"""Several videos in one picture, above a time line."""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from arl2_jax.generation.video import MIN_WIDTH, Frames, enlarge

BACKGROUND, TEXT = (22, 22, 26), (235, 235, 235)
_GAP, _BORDER, _TITLE, _FOOTER = 12, 4, 30, 46


class Part(NamedTuple):
    """A part of the time line: frames [start, stop) with their label and color."""

    label: str
    color: tuple[int, int, int]
    start: int
    stop: int


def side_by_side(
    videos: Mapping[str, Frames], *, given: int, trained: int, width: int = MIN_WIDTH
) -> Frames:
    """Put videos next to each other under their names, above a time line.

    The colors of borders and time line distinguish given frames, generated ones, and those beyond
    the length of the training clips.

    Args:
      videos: label -> frames, all of one size; after the end of a shorter one its place is empty.
      given: frames at the start that the models were given.
      trained: frames of a training clip.
      width: least number of columns of each video.

    Raises:
      ValueError: no videos, or of different sizes.
    """
    if len({video.shape[1:] for video in videos.values()}) != 1:
        shapes = {label: video.shape for label, video in videos.items()}
        raise ValueError(f"videos must be of one size; these are {shapes}")
    shown = {label: enlarge(video, width) for label, video in videos.items()}
    count = max(len(video) for video in shown.values())
    height, width = next(iter(shown.values())).shape[1:3]
    columns = _columns(len(shown), height, width)
    corners = {
        label: (
            _GAP + (i // columns) * (_TITLE + height + 2 * _BORDER + _GAP) + _TITLE + _BORDER,
            _GAP + (i % columns) * (width + 2 * _BORDER + _GAP) + _BORDER,
        )
        for i, label in enumerate(shown)
    }
    size = (
        max(top for top, _ in corners.values()) + height + _BORDER + _FOOTER,
        max(left for _, left in corners.values()) + width + _BORDER + _GAP,
    )
    frames = []
    for part in timeline(count, given, trained):
        canvas = _canvas(size, corners, (height, width), part, (count, given, trained))
        for t in range(part.start, part.stop):
            frame = canvas.copy()
            for label, (top, left) in corners.items():
                if t < len(shown[label]):
                    frame[top : top + height, left : left + width] = shown[label][t]
            _draw_cursor(frame, t, count)
            frames.append(frame)
    return np.stack(frames)


def timeline(count: int, given: int, trained: int) -> list[Part]:
    """Return the non-empty parts of a video of `count` frames."""
    parts = [
        Part("given", (86, 148, 255), 0, min(given, count)),
        Part("generated", (64, 190, 112), given, min(trained, count)),
        Part("beyond training length", (255, 160, 48), max(given, trained), count),
    ]
    return [part for part in parts if part.start < part.stop]


def _columns(count: int, height: int, width: int) -> int:
    """Return the number of columns that comes near to 16 : 9 and leaves few places empty."""

    def fault(columns: int) -> float:
        rows = math.ceil(count / columns)
        shape = columns * (width + _GAP) / (rows * (height + _TITLE + _GAP) + _FOOTER)
        return abs(math.log(shape * 9 / 16)) + (rows * columns / count - 1) * 2

    return min(range(1, count + 1), key=fault)


def _canvas(size, corners, panel, part: Part, length) -> np.ndarray:
    """Draw all that stays the same over the frames of a part."""
    image = Image.new("RGB", size[::-1], BACKGROUND)
    draw = ImageDraw.Draw(image)
    for label, (top, left) in corners.items():
        bottom, right = top + panel[0] - 1, left + panel[1] - 1
        draw.text((left, top - _BORDER - _TITLE / 2), label, TEXT, _font(20), anchor="lm")
        border = (left - _BORDER, top - _BORDER, right + _BORDER, bottom + _BORDER)
        draw.rectangle(border, outline=part.color, width=_BORDER)
        draw.rectangle((left, top, right, bottom), fill=(44, 44, 48))
    for other in timeline(*length):
        ends = [_time(size[1], t, length[0]) for t in (other.start, other.stop)]
        bright = 1.0 if other == part else 0.45
        color = tuple(int(bright * c) for c in other.color)
        draw.rectangle((ends[0], size[0] - 15, ends[1] - 3, size[0] - 9), fill=color)
        if other == part:
            # A short part at the end has no room for its label on its right.
            room = size[1] - _GAP - draw.textlength(part.label, _font(16))
            draw.text((min(ends[0], room), size[0] - 21), part.label, part.color, _font(16), "ls")
    return np.asarray(image)


def _draw_cursor(frame: np.ndarray, t: int, count: int) -> None:
    start, stop = (_time(frame.shape[1], t + i, count) for i in (0, 1))
    frame[-17:-6, start : max(stop - 3, start + 3)] = TEXT


def _time(width: int, t: int, count: int) -> int:
    """Return the column at which frame t starts on the time line."""
    return _GAP + round((width - 2 * _GAP) * t / count)


@functools.cache
def _font(size: int):
    return ImageFont.load_default(size)
