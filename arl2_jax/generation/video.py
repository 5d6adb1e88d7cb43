"""Videos as files, and several of them in one picture."""

import functools
import math
import tempfile
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, cast

import av
import numpy as np
from absl import logging
from av.video.stream import VideoStream
from etils import epath
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from arl2_jax.storage import move_whole

# Pixels [F, H, W, 3], of sizes that may differ within a call.
Frames = UInt8[np.ndarray, "_ _ _ 3"]

# Narrower videos are shown as a blur by most players, which smooth when they enlarge.
MIN_WIDTH = 384

BACKGROUND, TEXT = (22, 22, 26), (235, 235, 235)
_GAP, _BORDER, _TITLE, _FOOTER = 12, 4, 30, 46


class Part(NamedTuple):
    """A part of the time line: frames [start, stop), what they are, and their colour."""

    label: str
    color: tuple[int, int, int]
    start: int
    stop: int


class VideoWriter:
    """Writes an mp4 file frame by frame; a context manager.

    The file is one that common players and browsers show. It gets its name when it is complete;
    after an exception there is none. What is held in memory does not grow with the video.

    Args:
      path: local or remote file; a file of that name is replaced.
      fps: frames a second.

    Raises:
      ValueError: fps is not positive.
    """

    def __init__(self, path: epath.PathLike, fps: float):
        if not fps > 0:
            raise ValueError(f"fps={fps} must be positive")
        self._path, self._rate = epath.Path(path), Fraction(fps).limit_denominator(1001)
        self._count, self._stream = 0, None

    def __enter__(self) -> "VideoWriter":
        self._scratch = tempfile.TemporaryDirectory()
        self._file = Path(self._scratch.name) / "video.mp4"
        self._container = av.open(str(self._file), "w", format="mp4")
        return self

    def write(self, frames: Frames) -> None:
        """Appends frames; small ones are enlarged by whole factors to at least `MIN_WIDTH` columns.

        Raises:
          ValueError: frames are not uint8 [F, H, W, 3] with at least one frame.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
            raise ValueError(
                f"frames are {frames.dtype} {frames.shape}; uint8 [F, H, W, 3] is needed"
            )
        for picture in frames:
            # Colours are stored for squares of 2 x 2 pixels.
            large = enlarge(picture[None], MIN_WIDTH)[0]
            even = [(0, large.shape[0] % 2), (0, large.shape[1] % 2), (0, 0)]
            frame = av.VideoFrame.from_ndarray(np.pad(large, even, mode="edge"), format="rgb24")
            if self._stream is None:
                self._stream = self._add_stream(frame)
            frame.pts, frame.time_base = self._count, 1 / self._rate
            self._container.mux(self._stream.encode(frame))
            self._count += 1

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._scratch:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode())
            self._container.close()
            if kind is None and self._stream is not None:
                move_whole(self._file, self._path)

    def _add_stream(self, frame: av.VideoFrame) -> VideoStream:
        codec, options = _codec()
        stream = cast(
            VideoStream, self._container.add_stream(codec, rate=self._rate, options=options)
        )
        stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, "yuv420p"
        return stream


def write_video(path: epath.PathLike, frames: Frames, fps: float) -> None:
    """Writes frames as an mp4 file, whole or not at all; see `VideoWriter`."""
    with VideoWriter(path, fps) as writer:
        writer.write(frames)


def enlarge(frames: Frames, width: int) -> Frames:
    """Repeats pixels by the least whole factor that gives at least `width` columns."""
    factor = max(math.ceil(width / frames.shape[2]), 1)
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def side_by_side(
    videos: Mapping[str, Frames], *, given: int, trained: int, width: int = MIN_WIDTH
) -> Frames:
    """Puts videos next to each other under their names, over a time line.

    Borders and the time line tell frames that were given from generated ones, and those that lie
    beyond the length of the training clips.

    Args:
      videos: label -> frames, all of one size; where a shorter one has ended its place is empty.
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
    """The parts of a video of `count` frames that are not empty."""
    parts = [
        Part("given", (86, 148, 255), 0, min(given, count)),
        Part("generated", (64, 190, 112), given, min(trained, count)),
        Part("beyond training length", (255, 160, 48), max(given, trained), count),
    ]
    return [part for part in parts if part.start < part.stop]


def _columns(count: int, height: int, width: int) -> int:
    """Number of columns that brings the whole near to 16 : 9 and leaves few places empty."""

    def fault(columns: int) -> float:
        rows = math.ceil(count / columns)
        shape = columns * (width + _GAP) / (rows * (height + _TITLE + _GAP) + _FOOTER)
        return abs(math.log(shape * 9 / 16)) + (rows * columns / count - 1) * 2

    return min(range(1, count + 1), key=fault)


def _canvas(size, corners, panel, part: Part, length) -> np.ndarray:
    """Everything of a part's frames that does not move."""
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
    """Column at which frame t starts on the time line."""
    return _GAP + round((width - 2 * _GAP) * t / count)


@functools.cache
def _font(size: int):
    return ImageFont.load_default(size)


@functools.cache
def _codec() -> tuple[str, dict[str, str]]:
    """Name and options of the best encoder that this build of FFmpeg has."""
    try:
        av.Codec("libx264", "w")
    except ValueError:
        logging.warning("this build of FFmpeg has no libx264; videos are written as mpeg4")
        return "mpeg4", {"b": "6M"}
    return "libx264", {"crf": "18"}
