import dataclasses
import pickle
from fractions import Fraction

import av
import numpy as np
import pytest
from data_sizes import make_data, tiny_model

from arl2_jax.config import Config, EvaluationConfig
from arl2_jax.data import VideoClips, open_data, videos
from arl2_jax.errors import ConfigError, DataError

CODECS = {".mp4": "mpeg4", ".avi": "mpeg4", ".mkv": "mpeg4", ".mov": "mpeg4"}


def write_video(path, frames, fps=8, codec=None, gop=4, aspect=None):
    """Writes frames uint8 [N, H, W, 3]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec or CODECS[path.suffix], rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        stream.gop_size = gop
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def brightness_ramp(count, height=48, width=96, slope=2):
    """A video whose brightness is its time: frame t has the gray level 20 + slope t."""
    levels = (20 + slope * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def data_config(path, **changes):
    return make_data(source="video", path=str(path), **{"frames": 4, "held_out": 8, **changes})


def levels(clip):
    """Mean gray level of each frame."""
    return clip[0].astype(float).mean((1, 2, 3))


@pytest.mark.parametrize("suffix", sorted(CODECS))
@pytest.mark.parametrize("fps", [8, 16, 24])
def test_frames_are_taken_at_the_asked_rate(tmp_path, suffix, fps):
    """Two seconds have 16 frames at 8 fps for any frame rate of the file; brightness is time."""
    write_video(tmp_path / f"ramp{suffix}", brightness_ramp(2 * fps, slope=4), fps)
    clips = VideoClips(data_config(tmp_path), 16 // 2)
    video = clips.videos[0]
    assert len(video.times) == 16
    whole = videos.decode_frames(video.path, video.times, (24, 48))
    times = (whole.astype(float).mean((1, 2, 3)) - 20) / 4 / fps
    np.testing.assert_allclose(times, np.arange(16) / 8, atol=0.6 / fps)


def test_slow_videos_hold_their_frames(tmp_path):
    write_video(tmp_path / "slow.mp4", brightness_ramp(8, slope=20), fps=4)
    clips = VideoClips(data_config(tmp_path), 4)
    whole = videos.decode_frames(clips.videos[0].path, clips.videos[0].times, (24, 48))
    expected = np.repeat(20 + 20 * np.arange(8), 2)
    np.testing.assert_allclose(whole.astype(float).mean((1, 2, 3)), expected, atol=3)


@pytest.mark.parametrize("suffix", sorted(CODECS))
def test_seeking_gives_the_frames_of_the_whole(tmp_path, suffix, monkeypatch):
    rng = np.random.default_rng(0)
    moving = brightness_ramp(40) + rng.integers(20, size=(40, 1, 1, 3)).astype(np.uint8)
    write_video(tmp_path / f"a{suffix}", moving, fps=25, gop=7)
    kept, sought = VideoClips(data_config(tmp_path), 4), VideoClips(data_config(tmp_path), 4)

    def draw(clips):
        held = [clips.held_out(index)[0] for index in range(8)]
        return held + [clips.training(0, np.random.default_rng(i))[0] for i in range(8)]

    expected = draw(kept)
    monkeypatch.setattr(videos, "MEMORY_BYTES", 0)
    np.testing.assert_array_equal(draw(sought), expected)
    assert kept._kept and not sought._kept


def test_held_out_clips_never_overlap_training_clips(tmp_path):
    """Brightness is time: the latest training frame comes before the earliest held-out one."""
    write_video(tmp_path / "b" / "ramp.mp4", brightness_ramp(60))
    write_video(tmp_path / "a.mp4", brightness_ramp(20))
    clips = VideoClips(data_config(tmp_path), 4)
    assert [v.path.name for v in clips.videos] == ["a.mp4", "ramp.mp4"]
    assert [(v.training, len(v.times)) for v in clips.videos] == [(16, 20), (48, 60)]
    assert len(clips) == 16 // 4 + 48 // 4
    seen = {"a": [], "ramp": []}
    for index in range(len(clips)):
        for draw in range(5):
            clip = clips.training(index, np.random.default_rng(draw))
            seen[clip[1]].append(levels(clip).max())
    held = [clips.held_out(index) for index in range(8)]
    assert {caption for _, caption in held} == {"a", "ramp"}
    for clip in held:
        assert levels(clip).min() > max(seen[clip[1]])
        assert clip[0].shape == (4, 24, 48, 3) and clip[0].dtype == np.uint8


def test_short_files_hold_out_whole_files(tmp_path):
    for name in ("a", "b", "c"):
        write_video(tmp_path / f"{name}.mp4", brightness_ramp(6))
    clips = VideoClips(data_config(tmp_path), 4)
    captions = {clips.training(i, np.random.default_rng(i))[1] for i in range(len(clips))}
    assert captions == {"a", "b"} and clips.held_out(0)[1] == clips.held_out(5)[1] == "c"


def test_resize_covers_crops_the_center_and_respects_the_shape_of_pixels(tmp_path):
    """A disc in the middle of a wide frame stays round and in the middle."""
    y, x = np.mgrid[:96, :256]
    wide = np.where((y - 47.5) ** 2 + (x - 127.5) ** 2 < 30**2, 255, 0).astype(np.uint8)
    narrow = wide[:, ::2]
    for name, image, aspect in (("wide", wide, None), ("narrow", narrow, Fraction(2))):
        frames = np.broadcast_to(image[None, ..., None], (8, *image.shape, 3)).copy()
        write_video(tmp_path / name / "disc.mkv", frames, aspect=aspect)
        clips = VideoClips(data_config(tmp_path / name), 4)
        disc = clips.held_out(0)[0][0, ..., 0] > 127
        rows, columns = np.flatnonzero(disc.any(1)), np.flatnonzero(disc.any(0))
        assert abs(len(rows) - 15) <= 1 and abs(len(columns) - 15) <= 1
        assert abs(rows.mean() - 11.5) <= 0.5 and abs(columns.mean() - 23.5) <= 0.5


def test_rotated_files_are_turned(tmp_path):
    """A display matrix that says: turn a quarter clockwise, as telephones write it."""
    frames = np.zeros((8, 96, 48, 3), np.uint8)
    frames[:, 48:] = 255
    path = tmp_path / "phone.mp4"
    write_video(path, frames)
    upright = np.array([1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30], ">i4").tobytes()
    turned = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 48 << 16, 0, 1 << 30], ">i4").tobytes()
    content = path.read_bytes()
    track = content.index(b"tkhd")
    path.write_bytes(content[:track] + content[track:].replace(upright, turned, 1))
    clip = VideoClips(data_config(tmp_path), 4).held_out(0)[0]
    assert clip[0, :, :20].mean() > 250 and clip[0, :, 28:].mean() < 5


def test_training_clips_are_mirrored_at_random_and_drawn_by_the_generator(tmp_path):
    frames = brightness_ramp(30)
    frames[:, :, :48] = 0
    write_video(tmp_path / "a_dog-Running 2.mp4", frames)
    clips = VideoClips(data_config(tmp_path), 4)
    draws = [clips.training(0, np.random.default_rng(i)) for i in range(20)]
    mirrored = [video[:, :, :20].mean() > video[:, :, 28:].mean() for video, _ in draws]
    assert 3 < sum(mirrored) < 17
    assert draws[0][1] == "a dog Running 2"
    again = clips.training(0, np.random.default_rng(7))[0]
    np.testing.assert_array_equal(again, draws[7][0])
    copy = pickle.loads(pickle.dumps(clips))
    np.testing.assert_array_equal(copy.training(0, np.random.default_rng(7))[0], again)


def test_what_gives_no_clip_is_skipped_and_named(tmp_path, caplog):
    write_video(tmp_path / "good.mp4", brightness_ramp(20))
    write_video(tmp_path / "short.mp4", brightness_ramp(2))
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    (tmp_path / "notes.txt").write_text("not looked at")
    with caplog.at_level("WARNING", logger="absl"):
        clips = VideoClips(data_config(tmp_path), 4)
    assert [video.path.name for video in clips.videos] == ["good.mp4"]
    (record,) = caplog.records
    for part in ("2 of 3", "broken.mp4 (cannot be decoded", "short.mp4 (2 frames at 8 fps"):
        assert part in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_file_cut_off_while_written_gives_what_it_has(tmp_path):
    write_video(tmp_path / "cut.mkv", brightness_ramp(64, slope=3))
    content = (tmp_path / "cut.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) // 2])
    clips = VideoClips(data_config(tmp_path), 4)
    assert 8 <= len(clips.videos[0].times) < 64
    clips.held_out(0)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, r"data\.path=.*is not a folder.*data\.source=synthetic"),
        (lambda path: path.mkdir(), r"data\.path=.*holds no video file.*data\.source=synthetic"),
        (
            lambda path: (path.mkdir(), (path / "x.mp4").write_bytes(b"junk" * 99)),
            r"data\.path=.*none of its 1 video files.*x\.mp4 \(cannot be decoded",
        ),
        (
            lambda path: write_video(path / "x.mp4", brightness_ramp(3)),
            r"none of its 1 .* 4 frames at data\.fps=8.*x\.mp4 \(3 frames",
        ),
        (
            lambda path: write_video(path / "x.mp4", brightness_ramp(6)),
            r"one video of 6 frames.* need 8",
        ),
    ],
    ids=["missing", "empty", "undecodable", "short", "nothing_held_out"],
)
def test_unusable_folders_are_refused_in_one_line(tmp_path, prepare, message):
    prepare(tmp_path / "folder")
    config = Config(
        tiny_model(),
        data=data_config(tmp_path / "folder"),
        evaluation=EvaluationConfig(clips=8),
    )
    with pytest.raises(DataError, match=message) as error:
        open_data(config)
    assert "\n" not in str(error.value)


def test_batches_of_video(tmp_path):
    write_video(tmp_path / "ramp.mp4", brightness_ramp(60))
    config = Config(tiny_model(), data=data_config(tmp_path), evaluation=EvaluationConfig(clips=8))
    data = open_data(config)
    batch = next(data.train_batches(6, 0))
    assert batch["latents"].shape == (6, 4, 6, 12, 48) and batch["text"].shape == (6, 8, 32)
    pixels = data.codec.decode(data.held_out(3)["latents"])
    held = [data.clips.clips.held_out(i)[0] for i in range(3)]
    np.testing.assert_allclose(pixels, np.stack(held) / 127.5 - 1, atol=1e-6)
    few = dataclasses.replace(config, data=data_config(tmp_path, held_out=4))
    with pytest.raises(ConfigError, match=r"evaluation\.clips=8 .*data\.held_out=4"):
        open_data(few)
