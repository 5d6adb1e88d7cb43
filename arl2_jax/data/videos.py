"""Clips cut from a folder of video files."""

import re
from pathlib import Path
from typing import NamedTuple

import av
import av.container
import av.video
import numpy as np
from absl import logging
from av.error import FFmpegError, InvalidDataError

from arl2_jax.config import DataConfig
from arl2_jax.errors import DataError

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif", ".m4v", ".mpg", ".mpeg", ".ts", ".ogv")
# Frames are small after resizing: a gibibyte in each process holds hours of 24 x 48 pixels, so most
# folders are decoded only once; what does not fit is decoded again from the nearest key frame.
MEMORY_BYTES = 2**30
# Seconds: containers round time stamps, some to milliseconds.
_TOLERANCE = 1e-3


class Video(NamedTuple):
    """A video file, sampled at the frame rate of the clips.

    Attributes:
      path: the file.
      times: float64 [N], seconds in the file at which its frames are taken.
      training: number of its first frames from which training clips are cut; held-out clips are
        cut from the rest.
      caption: description of the video.
    """

    path: Path
    times: np.ndarray
    training: int
    caption: str


class VideoClips:
    """Clips of a folder's video files, resized to cover the frame and cropped at its center.

    Files are found recursively, in sorted order. The end of each file (a fifth of it, at least one
    clip) is kept for the held-out clips. The caption is the text of a file next to it (a.txt for
    a.mp4) or, without one, the words in the video's name.

    Args:
      data: path, height, width, fps and held_out are read.
      pixel_frames: frames F of a clip.

    Raises:
      DataError: there is no folder, no video file in it, or none as long as a clip.
    """

    def __init__(self, data: DataConfig, pixel_frames: int):
        self._data, self._frames = data, pixel_frames
        videos = index_videos(Path(data.path), data.fps, pixel_frames)
        self.videos = _split(videos, pixel_frames, data)
        self._first = np.cumsum([0] + [video.training // pixel_frames for video in self.videos])
        held_out = [len(video.times) - video.training for video in self.videos]
        starts = [max(frames - pixel_frames + 1, 0) for frames in held_out]
        self._first_held_out = np.cumsum([0, *starts])
        self._kept: dict[Path, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getstate__(self):
        return self.__dict__ | {"_kept": {}}

    def training(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """Return video uint8 [F, H, W, 3] and caption; `rng` draws the start and mirroring."""
        video = self.videos[int(np.searchsorted(self._first, index, "right")) - 1]
        start = int(rng.integers(video.training - self._frames, endpoint=True))
        frames, caption = self._clip(video, start)
        return (frames[:, :, ::-1] if rng.random() < 0.5 else frames), caption

    def held_out(self, index: int) -> tuple[np.ndarray, str]:
        """Return video and caption of a held-out clip; the first few are spread over the files."""
        spread = index * (np.sqrt(5) - 1) / 2 % 1
        place = int(spread * self._first_held_out[-1])
        chosen = int(np.searchsorted(self._first_held_out, place, "right")) - 1
        video = self.videos[chosen]
        return self._clip(video, video.training + place - int(self._first_held_out[chosen]))

    def _clip(self, video: Video, start: int) -> tuple[np.ndarray, str]:
        size = self._data.height, self._data.width
        span = slice(start, start + self._frames)
        if video.path not in self._kept:
            kept = sum(frames.nbytes for frames in self._kept.values())
            if kept + len(video.times) * size[0] * size[1] * 3 > MEMORY_BYTES:
                return decode_frames(video.path, video.times[span], size), video.caption
            self._kept[video.path] = decode_frames(video.path, video.times, size)
        return self._kept[video.path][span], video.caption


def read_frames(path: Path, fps: float, count: int, size: tuple[int, int]) -> np.ndarray:
    """Read the first `count` frames of a video file, processed like those of training clips.

    Args:
      path: the file.
      fps: frames a second.
      count: number of frames.
      size: height and width; frames are resized to cover them and cropped at the center.

    Returns:
      uint8 [count, height, width, 3].

    Raises:
      DataError: the file cannot be decoded or is too short.
    """
    if not path.is_file():
        raise DataError(f"there is no video file {path}", remedy="name another")
    try:
        times = _sample_times(path, fps)
        if len(times) >= count:
            return decode_frames(path, times[:count], size)
    except (FFmpegError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path} cannot be decoded: {reason}", remedy="name another video"
        ) from None
    raise DataError(
        f"{path} has {len(times)} frames at {fps:g} fps, fewer than the {count} that are needed",
        remedy="name a longer video",
    )


def index_videos(folder: Path, fps: float, pixel_frames: int) -> list[Video]:
    """Find the videos as long as a clip, in sorted order; name all others in one warning.

    Args:
      folder: searched with its subfolders.
      fps: frames a second at which the files are sampled.
      pixel_frames: frames of a clip.

    Raises:
      DataError: there is no folder, no video file in it, or none as long as a clip.
    """
    if not folder.is_dir():
        raise DataError(
            "is not a folder",
            field="data.path",
            value=folder,
            remedy="name the folder of the video files, or set data.source=synthetic",
        )
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(
            f"holds no video file ({', '.join(SUFFIXES)})",
            field="data.path",
            value=folder,
            remedy="put some there, or set data.source=synthetic",
        )
    videos, skipped = [], []
    for path in paths:
        try:
            times = _sample_times(path, fps)
        except (FFmpegError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            skipped.append(f"{path.name} (cannot be decoded: {reason})")
            continue
        if len(times) >= pixel_frames:
            videos.append(Video(path, times, len(times), _caption(path)))
        else:
            skipped.append(f"{path.name} ({len(times)} frames at {fps:g} fps, fewer than a clip)")
    if not videos:
        raise DataError(
            f"has no clip: none of its {len(paths)} video files has {pixel_frames} frames at "
            f"data.fps={fps:g}, the first is {skipped[0]}",
            field="data.path",
            value=folder,
            remedy="add longer videos or lower data.frames",
        )
    if skipped:
        named = ", ".join(skipped[:20]) + (", ..." if len(skipped) > 20 else "")
        logging.warning("%d of %d video files skipped: %s", len(skipped), len(paths), named)
    return videos


def _caption(path: Path) -> str:
    text = path.with_suffix(".txt")
    if text.is_file():
        return " ".join(text.read_text(errors="replace").split())
    return " ".join(re.findall(r"[^\W_]+", path.stem))


def _split(videos: list[Video], pixel_frames: int, data: DataConfig) -> list[Video]:
    """Hold out the end of each file, or whole files if all are too short to split."""
    split = []
    for video in videos:
        frames = len(video.times)
        end = max(frames // 5, pixel_frames) if frames >= 2 * pixel_frames else 0
        split.append(video._replace(training=frames - end))
    if any(video.training < len(video.times) for video in split):
        return split
    if len(videos) == 1:
        raise DataError(
            f"gives one video of {len(videos[0].times)} frames, but a training and a "
            f"held-out clip need {2 * pixel_frames}",
            field="data.path",
            value=data.path,
            remedy="add videos or lower data.frames",
        )
    whole = max(len(videos) // 10, 1)
    return videos[:-whole] + [video._replace(training=0) for video in videos[-whole:]]


def _sample_times(path: Path, fps: float) -> np.ndarray:
    """Return the seconds at which the file is sampled; decode its first frame as a check."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        stamps = [packet.pts if packet.pts is not None else packet.dts for packet in packets]
        shown = np.sort([stamp for stamp in stamps if stamp is not None]).astype(float)
        if not len(shown) or stream.time_base is None:
            raise ValueError("its frames have no time stamps")
        shown *= float(stream.time_base)
    decode_frames(path, shown[:1], (2, 2))
    # The last frame is shown for the average time of those before it; a tenth of a frame is a
    # margin for rounded time stamps.
    period = (shown[-1] - shown[0]) / max(len(shown) - 1, 1)
    count = int((shown[-1] - shown[0] + period) * fps + 0.1)
    return shown[0] + np.arange(count) / fps


def decode_frames(
    path: Path, times: np.ndarray, size: tuple[int, int], seek: bool = True
) -> np.ndarray:
    """Decode the frames shown at rising `times` in seconds: uint8 [N, H, W, 3].

    Times past the last frame that can be decoded show that frame.
    """
    taken: list[np.ndarray] = []
    shown: av.VideoFrame | None = None
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        aspect = float(stream.sample_aspect_ratio or 1)
        if seek and stream.time_base:
            container.seek(int(times[0] / float(stream.time_base)), stream=stream)
        for frame in _decodable(container, stream):
            if shown is None and seek and frame.time > times[0] + _TOLERANCE:
                return decode_frames(path, times, size, seek=False)
            # The previous frame is shown at all times up to this one's.
            stop = int(np.searchsorted(times, frame.time - _TOLERANCE))
            if stop > len(taken):
                taken += [_fit(shown or frame, size, aspect)] * (stop - len(taken))
            shown = frame
            if stop == len(times):
                break
    if shown is None:
        raise ValueError("none of its frames can be decoded")
    if len(taken) < len(times):
        taken += [_fit(shown, size, aspect)] * (len(times) - len(taken))
    return np.stack(taken)


def _decodable(container: av.container.InputContainer, stream: av.video.VideoStream):
    """Yield the frames in the order they are shown, skipping damaged packets."""
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except InvalidDataError:
            continue
        for frame in frames:
            if frame.time is not None:
                yield frame


def _fit(frame: av.VideoFrame, size: tuple[int, int], aspect: float) -> np.ndarray:
    """Resize a frame, as displayed, to cover (height, width) and crop the center.

    Args:
      frame: pixels `aspect` times as wide as high, perhaps stored rotated.
      size: height and width.
      aspect: width of a pixel over its height.
    """
    turns = round(frame.rotation / 90) % 4
    height, width = size if turns % 2 == 0 else size[::-1]
    scale = max(height / frame.height, width / (frame.width * aspect))
    rows = max(round(frame.height * scale), height)
    columns = max(round(frame.width * aspect * scale), width)
    pixels = frame.reformat(columns, rows, "rgb24", interpolation="AREA").to_ndarray()
    top, left = (rows - height) // 2, (columns - width) // 2
    return np.rot90(pixels[top : top + height, left : left + width], turns)
