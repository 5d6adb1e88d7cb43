"""Constructed rollouts with known truth are read correctly."""

import dataclasses

import numpy as np
import pytest

from arl2_jax.codecs import make_codec
from arl2_jax.config import Config, DataConfig, ModelConfig, SpriteConfig
from arl2_jax.data.sprites import BACKGROUNDS, make_clip
from arl2_jax.evaluation.drift import beginnings, drift_scores, read_rollout, true_clip
from arl2_jax.evaluation.lanes import PARTLY, lanes_of, read_lanes
from arl2_jax.evaluation.recall import NOTHING

SPRITES = SpriteConfig(
    count=(1, 2), colors=6, shapes=3, size=7, speed=(4.0, 5.0), occluder_width=13, pause=(4, 9),
    lamp=2,
)  # fmt: skip
CONFIG = Config(ModelConfig.tiny(), data=DataConfig(frames=8, height=16, width=40, sprites=SPRITES))
F, BLOCKS, GIVEN, VIDEOS = CONFIG.model.frames_per_block, 40, 2, 6
CODEC = make_codec(CONFIG)


@pytest.fixture(scope="module")
def rollout():
    """Beginnings, and the blocks of the true clips that follow them."""
    given = beginnings(CONFIG, CODEC, VIDEOS, GIVEN)
    clips = [true_clip(CONFIG, i, (GIVEN + BLOCKS) * F) for i in range(VIDEOS)]
    return given, clips


def as_blocks(clips):
    pixels = np.stack([clip.video[GIVEN * F :] for clip in clips]).astype(np.float32) / 127.5 - 1
    latents = CODEC.encode(pixels)
    return [latents[:, i * F : (i + 1) * F] for i in range(BLOCKS)]


def read(given, clips, **options):
    return read_rollout(as_blocks(clips), CODEC, given.lanes, SPRITES, **options)


def test_beginnings_are_those_of_the_true_clips(rollout):
    given, clips = rollout
    for begun, clip in zip(given.clips, clips, strict=True):
        np.testing.assert_array_equal(begun.video, clip.video[: GIVEN * F])
        assert (begun.visible[0] == 1).all()


def test_truth_is_read_as_it_is(rollout):
    given, clips = rollout
    found = read(given, clips).identities
    for n, clip in enumerate(clips):
        visible = clip.visible[GIVEN * F :].reshape(BLOCKS, F, -1)
        for s in range(visible.shape[2]):
            readings, own = found[:, n, s], given.lanes.identities[n, s]
            whole, hidden = (visible[..., s] == 1).any(1), (visible[..., s] == 0).all(1)
            assert (readings[whole] == own).all()
            assert (readings[hidden] == NOTHING).all()
            # A disc or a triangle may lack pixels at its edge: seen in part, it may be read whole.
            assert np.isin(readings[~whole & ~hidden], [PARTLY, own, NOTHING]).all()
    scores = drift_scores(found, given.lanes.identities)
    assert all(part["right"] in (1.0, None) for part in scores)
    assert sum(part["returns"]["count"] for part in scores) > 10
    assert [part["blocks"] for part in scores[:3]] == [[0, 0], [1, 2], [3, 6]]


def test_a_sprite_that_changes_is_seen_where_it_does(rollout):
    given, clips = rollout
    changed, k = list(clips), 20
    first = clips[0]
    identity = [
        ((c + 1) % 6, s) for c, s in zip(first.colors.tolist(), first.shapes.tolist(), strict=True)
    ]
    other = true_clip(CONFIG, 0, (GIVEN + BLOCKS) * F, identity)
    np.testing.assert_array_equal(other.positions, first.positions)
    video = np.concatenate([first.video[: (GIVEN + k) * F], other.video[(GIVEN + k) * F :]])
    changed[0] = first._replace(video=video)
    found = read(given, changed).identities
    wanted = given.lanes.identities
    wrong = (found >= 0) & (found != wanted) & (wanted != NOTHING)
    assert not wrong[:k].any() and not wrong[:, 1:].any()
    assert wrong[k:, 0].any()
    scores = drift_scores(found, wanted, edges=(0, k))
    assert scores[0]["right"] == 1 and scores[1]["right"] < 1
    assert scores[1]["returns"]["right"] < scores[1]["same"]["right"] < 1


def test_an_empty_rollout_shows_nothing(rollout):
    given, clips = rollout
    tones = np.array(list(BACKGROUNDS.values()), np.uint8)
    blank = [
        clip._replace(video=np.broadcast_to(tones[clip.background], clip.video.shape))
        for clip in clips
    ]
    scores = drift_scores(read(given, blank).identities, given.lanes.identities)
    assert all(part["nothing"] == 1 and part["right"] is None for part in scores)


def test_noise_and_kept_frames(rollout):
    given, clips = rollout
    rng = np.random.default_rng(0)
    noisy = []
    for clip in clips:
        video = clip.video + rng.normal(0, 20, clip.video.shape)
        noisy.append(clip._replace(video=np.clip(video, 0, 255).astype(np.uint8)))
    found = read(given, noisy, kept=(0, 7), videos=3)
    scores = drift_scores(found.identities, given.lanes.identities, edges=(0,))
    assert scores[0]["right"] > 0.98  # a tenth of the range of noise leaves few errors
    assert set(found.frames) == {0, 7}
    # Lossless up to rounding.
    last = np.stack([clip.video[(GIVEN + 8) * F - 1] for clip in noisy[:3]]).astype(int)
    assert abs(found.frames[7].astype(int) - last).max() <= 1


def test_lanes_without_a_sprite_are_not_counted():
    identities = np.array([[[3, NOTHING]], [[NOTHING, NOTHING]], [[4, 2]], [[3, 0]]])
    scores = drift_scores(identities, np.array([[3, NOTHING]]), edges=(0,))[0]
    assert scores["seen"] == 3 / 4 and scores["nothing"] == 1 / 4
    assert scores["right"] == 2 / 3 and scores["videos"] == 1
    assert scores["returns"] | {"interval": None} == {
        "right": 0.0, "interval": None, "videos": 1, "count": 1,
    }  # fmt: skip


def test_a_sprite_comes_back_once_and_is_compared_with_the_last_one():
    #              given 3; hidden, partly in sight, back as 4, goes, back as 4, and still there.
    identities = np.array([3, NOTHING, PARTLY, 4, PARTLY, 4, NOTHING, 4, 4])[:, None, None]
    scores = drift_scores(identities, np.array([[3]]), edges=(0,))[0]
    assert scores["returns"]["count"] == scores["same"]["count"] == 2
    assert scores["returns"]["right"] == 0 and scores["same"]["right"] == 1 / 2


def test_vertical_sprites_have_no_lanes():
    sprites = dataclasses.replace(SPRITES, vertical=True)
    clip = make_clip(sprites, CONFIG.data, 0)
    with pytest.raises(ValueError, match="no lanes"):
        lanes_of([clip], sprites)


def test_a_block_is_read_in_its_clearest_frame(rollout):
    given, clips = rollout
    pixels = np.stack([clip.video[:F] for clip in clips]).astype(np.float32) / 127.5 - 1
    # All frames but the first show the background alone.
    tones = np.array(list(BACKGROUNDS.values()), np.float32)[given.lanes.backgrounds] / 127.5 - 1
    pixels[:, 1:] = tones[:, None, None, None]
    found = np.asarray(read_lanes(pixels, given.lanes, SPRITES))
    known = given.lanes.identities != NOTHING
    np.testing.assert_array_equal(found[known], given.lanes.identities[known])
