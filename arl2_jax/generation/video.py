"""Videos as files."""

import functools
import math
import tempfile
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from absl import logging
from av.video.stream import VideoStream
from etils import epath
from jaxtyping import UInt8

from arl2_jax.storage import move_whole

# Pixels [F, H, W, 3]; sizes may differ within a call.
Frames = UInt8[np.ndarray, "_ _ _ 3"]

# Most players smooth when they enlarge, so narrower videos would look blurred.
MIN_WIDTH = 384


class VideoWriter:
    """Writes an mp4 file frame by frame; a context manager.

    Common players and browsers show the file. It gets its name when it is complete; after an
    exception there is no file. Memory does not grow with the video.

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
        """Append frames; small ones are enlarged by integers to at least `MIN_WIDTH` columns.

        Raises:
          ValueError: frames are not uint8 [F, H, W, 3] with at least one frame.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not frames.size:
            raise ValueError(
                f"frames are {frames.dtype} {frames.shape}; uint8 [F, H, W, 3] is needed"
            )
        for pixels in frames:
            # Colors are stored for squares of 2 x 2 pixels.
            large = enlarge(pixels[None], MIN_WIDTH)[0]
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
    """Write frames as an mp4 file, atomically; see `VideoWriter`."""
    with VideoWriter(path, fps) as writer:
        writer.write(frames)


def enlarge(frames: Frames, width: int) -> Frames:
    """Repeat pixels by the least integer factor that gives at least `width` columns."""
    factor = max(math.ceil(width / frames.shape[2]), 1)
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


@functools.cache
def _codec() -> tuple[str, dict[str, str]]:
    """Return name and options of the best encoder that this build of FFmpeg has."""
    try:
        av.Codec("libx264", "w")
    except ValueError:
        logging.warning("this build of FFmpeg has no libx264; videos are written as mpeg4")
        return "mpeg4", {"b": "6M"}
    return "libx264", {"crf": "18"}
