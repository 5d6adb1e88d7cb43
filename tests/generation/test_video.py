"""Video files: players read what was written."""

import av
import numpy as np
import pytest

from arl2_jax.generation import video
from arl2_jax.generation.video import (
    VideoWriter,
    enlarge,
    write_video,
)


def make_frames(count, height, width, seed=0):
    """Coarse squares of random colors that change from frame to frame."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(256, size=(count, -(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]


def read(path):
    """(frames, rate, codec) of a file."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), stream.average_rate, stream.codec_context.name


@pytest.mark.parametrize("fps", [8.0, 12.5])
def test_file_holds_the_frames(tmp_path, fps):
    frames = make_frames(7, 12, 32)
    write_video(tmp_path / "a.mp4", frames, fps)
    found, rate, codec = read(tmp_path / "a.mp4")
    assert found.shape == (7, 144, 384, 3) and rate == fps and codec == "h264"
    centers = found[:, 6::12, 6::12].astype(int)
    assert np.abs(centers - frames).mean() < 12
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_frames_may_come_in_parts(tmp_path):
    frames = make_frames(7, 12, 32)
    write_video(tmp_path / "whole.mp4", frames, 8)
    with VideoWriter(tmp_path / "parts.mp4", 8) as writer:
        for part in (frames[:1], frames[1:4], frames[4:]):
            writer.write(part)
    np.testing.assert_array_equal(*(read(tmp_path / f"{n}.mp4")[0] for n in ("whole", "parts")))


def test_odd_sizes_become_even(tmp_path):
    frames = make_frames(2, 11, 401)
    write_video(tmp_path / "a.mp4", frames, 10)
    assert read(tmp_path / "a.mp4")[0].shape == (2, 12, 402, 3)


def test_without_libx264_it_is_still_a_video(tmp_path, monkeypatch):
    def missing(name, mode):
        raise av.codec.codec.UnknownCodecError(name)

    video._codec.cache_clear()
    monkeypatch.setattr(av, "Codec", missing)
    try:
        write_video(tmp_path / "a.mp4", make_frames(5, 24, 48), 8)
    finally:
        video._codec.cache_clear()
    found, _, codec = read(tmp_path / "a.mp4")
    assert codec == "mpeg4" and len(found) == 5


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"before")

    def fail(*_):
        raise MemoryError

    with pytest.raises(MemoryError), VideoWriter(path, 8) as writer:
        writer.write(make_frames(2, 12, 32))
        fail()
    assert path.read_bytes() == b"before"
    monkeypatch.setattr(video, "move_whole", fail)
    with pytest.raises(MemoryError):
        write_video(path, make_frames(2, 12, 32), 8)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and path.read_bytes() == b"before"


@pytest.mark.parametrize(
    "frames",
    [np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)],
    ids=["floats", "one image", "no frames"],
)
def test_wrong_frames_are_refused(tmp_path, frames, unchecked):
    with pytest.raises(ValueError, match="uint8"):
        write_video(tmp_path / "a.mp4", frames, 8)
    with pytest.raises(ValueError, match="fps=0"):
        write_video(tmp_path / "a.mp4", make_frames(1, 8, 8), 0)


def test_enlarging_repeats_pixels():
    frames = make_frames(1, 3, 5)
    large = enlarge(frames, 11)
    assert large.shape == (1, 9, 15, 3)
    np.testing.assert_array_equal(large[:, 1::3, 1::3], frames)
    assert enlarge(frames, 4).shape == frames.shape
