"""The recall test reads the pixels: the truth scores 1, and what is not there does not."""

import itertools

import numpy as np
import pytest

from arl2_jax.codecs import make_codec
from arl2_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    SamplerConfig,
    SpriteConfig,
)
from arl2_jax.data.sprites import BACKGROUNDS, COLORS, OCCLUDER_COLOR, draw_sprite
from arl2_jax.evaluation.recall import (
    NOTHING,
    best_blind_answer,
    read_drawings,
    read_sprites,
    recall,
    recall_by_lag,
    recall_test,
    wilson,
)
from arl2_jax.text import embed_caption

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
    return recall_test(CONFIG, make_codec(CONFIG))


def score(videos, test):
    """Recall of whole uint8 videos."""
    f = CONFIG.model.frames_per_block
    blocks = [
        video[event.block * f :][:f] for video, event in zip(videos, test.events, strict=True)
    ]
    pixels = np.stack(blocks).astype(np.float32) / 127.5 - 1
    return recall(read_drawings(pixels[None], test, CONFIG), test.identities)


def test_the_true_videos_are_read_right(held_out):
    truth = {"recall": 1.0, "color": 1.0, "shape": 1.0}
    found = score([clip.video for clip in held_out.clips], held_out)
    interval = found.pop("interval")
    assert found == truth and interval[1] == 1 and 0.95 < interval[0] < 1


def test_the_batch_holds_the_clips(held_out):
    clips, batch = held_out.clips, held_out.batch
    assert batch["latents"].dtype == batch["text"].dtype == np.float32
    decoded = (make_codec(CONFIG).decode(batch["latents"]) + 1) * 127.5
    np.testing.assert_allclose(decoded, [clip.video for clip in clips], atol=1e-3)
    np.testing.assert_array_equal(batch["text"][3], embed_caption(clips[3].caption, 8, 32))


def test_a_little_noise_does_no_harm(held_out):
    rng = np.random.default_rng(0)
    noisy = [clip.video + rng.normal(0, 20, clip.video.shape) for clip in held_out.clips]
    assert score(noisy, held_out)["recall"] > 0.95


def test_erased_sprites_score_by_chance(held_out):
    erased = []
    for clip in held_out.clips:
        ground = np.array(list(BACKGROUNDS.values())[clip.background], np.uint8)
        occluded = (clip.video == OCCLUDER_COLOR).all(-1, keepdims=True)
        erased.append(np.where(occluded, clip.video, ground))
    assert score(erased, held_out)["recall"] < 0.25


def test_hidden_sprites_are_not_read(held_out):
    """The block before the one that is read, in which nothing of the sprite is seen."""
    f = CONFIG.model.frames_per_block
    hidden = [np.roll(clip.video, f, axis=0) for clip in held_out.clips]
    assert score(hidden, held_out)["recall"] < 0.25


def test_wrong_colors_are_wrong(held_out):
    tones = np.array(list(COLORS.values()), np.uint8)[: SPRITES.colors]
    permuted = []
    for clip in held_out.clips:
        video = clip.video.copy()
        for i, tone in enumerate(tones):
            video[(clip.video == tone).all(-1)] = tones[(i + 1) % len(tones)]
        permuted.append(video)
    found = score(permuted, held_out)
    assert (found["recall"], found["color"], found["shape"]) == (0, 0, 1)


def test_the_twin_is_wrong_in_color_and_shape(held_out):
    videos = [clip.video for clip in held_out.clips]
    twins = [videos[i + 1 - 2 * (i % 2)] for i in range(len(videos))]
    found = score(twins, held_out)
    assert (found["recall"], found["color"], found["shape"]) == (0, 0, 0)


def test_one_video_a_clip_is_needed(held_out):
    with pytest.raises(ValueError, match="zip"):
        score([clip.video for clip in held_out.clips][:-1], held_out)


@pytest.mark.parametrize("size", [5, 7])
def test_every_drawing_is_read_as_itself(size):
    sprites = SpriteConfig(colors=8, shapes=5, size=size)
    for background, tone in enumerate(BACKGROUNDS.values()):
        for color, shape in itertools.product(range(8), range(5)):
            rgb, mask = draw_sprite(shape, color, size)
            crop = np.where(mask[..., None], rgb, np.array(tone)) / 127.5 - 1
            assert read_sprites(crop, background, sprites).tolist() == [color, shape]


def test_a_sprite_half_behind_an_occluder_is_still_read():
    rgb, mask = draw_sprite(1, 2, 7)
    crop = np.where(mask[..., None], rgb, np.array(BACKGROUNDS["black"]))
    crop[:, :2] = OCCLUDER_COLOR
    sprites = SpriteConfig(colors=4, shapes=3, size=7)
    assert read_sprites(crop / 127.5 - 1, 0, sprites).tolist() == [2, 1]


@pytest.mark.parametrize("strength, seen", [(0.0, False), (0.4, False), (0.6, True), (1.0, True)])
def test_a_smear_is_read_as_nothing(strength, seen):
    """Between the bare background and the drawing, the nearer one is read."""
    tone = np.array(BACKGROUNDS["navy"])
    rgb, mask = draw_sprite(2, 2, 5)
    crop = np.where(mask[..., None], tone + strength * (rgb - tone), tone) / 127.5 - 1
    sprites = SpriteConfig(colors=4, shapes=3, size=5)
    found = read_sprites(crop, list(BACKGROUNDS).index("navy"), sprites)
    assert found.tolist() == ([2, 2] if seen else [NOTHING, NOTHING])


@pytest.mark.parametrize(
    ("hits", "clips", "low", "high"),
    # Newcombe 1998, table I, method 3 (Wilson without continuity correction).
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_those_of_the_literature(hits, clips, low, high):
    # The table has four digits.
    np.testing.assert_allclose(wilson(hits / clips, clips), [low, high], atol=5e-5)
    mirrored = wilson(1 - hits / clips, clips)
    np.testing.assert_allclose(mirrored, [1 - high, 1 - low], atol=5e-5)


def test_intervals_count_clips_not_drawings(held_out):
    """Two equal drawings of each clip give no narrower interval than one."""
    rng = np.random.default_rng(0)
    one = np.where(rng.random((1, 96, 1)) < 0.5, held_out.identities, NOTHING)
    assert recall(np.repeat(one, 2, axis=0), held_out.identities) == recall(
        one, held_out.identities
    )


def test_recall_by_lag_is_recall_of_those_clips():
    lags = np.array([1, 1, 2, 2, 2, 5])
    right = np.array([[1, 0, 1, 1, 1, 0], [1, 1, 0, 1, 1, 0]], bool)
    found = recall_by_lag(right, lags)
    assert {lag: (s["recall"], s["clips"]) for lag, s in found.items()} == {
        1: (0.75, 2), 2: (5 / 6, 3), 5: (0.0, 1),
    }  # fmt: skip
    assert found[2]["interval"] == wilson(5 / 6, 3)


def test_best_blind_answer_beats_or_equals_every_constant(held_out):
    best = best_blind_answer(held_out.identities)
    constants = [
        recall(np.broadcast_to([c, s], (1, 96, 2)), held_out.identities)["recall"]
        for c, s in itertools.product(range(4), range(3))
    ]
    assert best == max(constants) and 1 / 12 <= best < 0.1
