"""The recall test reads what is in the pixels: the truth scores 1, what is not there does not."""

import itertools

import numpy as np
import pytest

from arl2_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    SamplerConfig,
    SpriteConfig,
)
from arl2_jax.data import embed_caption, make_codec
from arl2_jax.data.sprites import BACKGROUNDS, COLORS, OCCLUDER_COLOR, draw_sprite
from arl2_jax.evaluation.recall import read_sprite, recall, recall_clips

CONFIG = Config(
    ModelConfig.tiny(in_dim=12, out_dim=12),
    SamplerConfig(method="euler", steps=8, shift=3.0),
    DataConfig(
        height=12,
        width=32,
        codec_factor=2,
        sprites=SpriteConfig(size=5, speed=(3.0, 3.0), occluder_width=14, count=(2, 2)),
    ),
    evaluation=EvaluationConfig(recall_clips=96),
)
SPRITES = CONFIG.data.sprites


@pytest.fixture(scope="module")
def held_out():
    return recall_clips(CONFIG, make_codec(CONFIG))


def score(videos, held_out, events=None):
    """Recall of uint8 videos."""
    pixels = np.stack(videos).astype(np.float32) / 127.5 - 1
    return recall(pixels, held_out[0], events or held_out[1], CONFIG)


def test_the_true_videos_are_read_right(held_out):
    clips, _, _ = held_out
    truth = {"recall": 1.0, "color": 1.0, "shape": 1.0, "chance": 1 / 12}
    assert score([clip.video for clip in clips], held_out) == truth


def test_the_batch_holds_the_clips(held_out):
    clips, _, batch = held_out
    assert batch["latents"].dtype == batch["text"].dtype == np.float32
    decoded = (make_codec(CONFIG).decode(batch["latents"]) + 1) * 127.5
    np.testing.assert_allclose(decoded, [clip.video for clip in clips], atol=1e-3)
    np.testing.assert_array_equal(batch["text"][3], embed_caption(clips[3].caption, 8, 32))


def test_a_little_noise_does_no_harm(held_out):
    rng = np.random.default_rng(0)
    noisy = [clip.video + rng.normal(0, 20, clip.video.shape) for clip in held_out[0]]
    assert score(noisy, held_out)["recall"] > 0.95


def test_erased_sprites_score_by_chance(held_out):
    erased = []
    for clip in held_out[0]:
        ground = np.array(list(BACKGROUNDS.values())[clip.background], np.uint8)
        occluded = (clip.video == OCCLUDER_COLOR).all(-1, keepdims=True)
        erased.append(np.where(occluded, clip.video, ground))
    assert score(erased, held_out)["recall"] < 0.25


def test_hidden_sprites_score_by_chance(held_out):
    clips, events, _ = held_out
    hidden = [event._replace(frame=event.block * 2 - 1) for event in events]
    assert score([clip.video for clip in clips], held_out, hidden)["recall"] < 0.25


def test_wrong_colors_are_wrong(held_out):
    tones = np.array(list(COLORS.values()), np.uint8)[: SPRITES.colors]
    permuted = []
    for clip in held_out[0]:
        video = clip.video.copy()
        for i, tone in enumerate(tones):
            video[(clip.video == tone).all(-1)] = tones[(i + 1) % len(tones)]
        permuted.append(video)
    found = score(permuted, held_out)
    assert (found["recall"], found["color"], found["shape"]) == (0, 0, 1)


def test_another_clip_is_wrong(held_out):
    videos = [clip.video for clip in held_out[0]]
    assert score(videos[1:] + videos[:1], held_out)["recall"] < 0.3


def test_one_video_a_clip_is_needed(held_out):
    with pytest.raises(ValueError):
        score([clip.video for clip in held_out[0]][:-1], held_out)


@pytest.mark.parametrize("size", [5, 7])
def test_every_drawing_is_read_as_itself(size):
    for background, tone in enumerate(BACKGROUNDS.values()):
        for color, shape in itertools.product(range(8), range(5)):
            rgb, mask = draw_sprite(shape, color, size)
            crop = np.where(mask[..., None], rgb, np.array(tone)) / 127.5 - 1
            assert read_sprite(crop, background, 8, 5) == (color, shape)


def test_a_sprite_half_behind_an_occluder_is_still_read():
    rgb, mask = draw_sprite(1, 2, 7)
    crop = np.where(mask[..., None], rgb, np.array(BACKGROUNDS["black"]))
    crop[:, :2] = OCCLUDER_COLOR
    assert read_sprite(crop / 127.5 - 1, 0, 4, 3) == (2, 1)


@pytest.mark.parametrize("strength, seen", [(0.0, False), (0.4, False), (0.6, True), (1.0, True)])
def test_a_smear_is_read_as_nothing(strength, seen):
    """Between the bare background and the drawing, the nearer one is read."""
    tone = np.array(BACKGROUNDS["navy"])
    rgb, mask = draw_sprite(2, 2, 5)
    crop = np.where(mask[..., None], tone + strength * (rgb - tone), tone) / 127.5 - 1
    found = read_sprite(crop, list(BACKGROUNDS).index("navy"), 4, 3)
    assert (found is not None) == seen
