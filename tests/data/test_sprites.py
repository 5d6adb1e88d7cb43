import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
from data_sizes import make_data, make_sprites, tiny_model

from arl2_jax.config import Config
from arl2_jax.data import draw_sprite, make_clip
from arl2_jax.data.sprites import BACKGROUNDS, COLORS, HELD_OUT_SEED, OCCLUDER_COLOR, SHAPES, check
from arl2_jax.errors import ConfigError

LANES = make_sprites()
FREE = make_sprites(count=(2, 3), colors=8, shapes=5, vertical=True, speed=(2.5, 6.0))
MANY = make_sprites(count=(2, 2), occluders=2, occluder_width=11, speed=(1.0, 2.0), colors=8)
CONFIGS = pytest.mark.parametrize("sprites", [LANES, FREE, MANY], ids=["lanes", "free", "many"])
DATA = make_data()


def clips(sprites, count=30, data=DATA):
    return [make_clip(sprites, data, seed) for seed in range(count)]


def make_config(**changes):
    sprites = dataclasses.replace(LANES, **changes)
    return Config(tiny_model(), data=make_data(sprites=sprites))


@CONFIGS
def test_clip_is_a_function_of_configs_and_seed(sprites):
    again = [make_clip(sprites, DATA, seed) for seed in (3, HELD_OUT_SEED + 3)]
    for a, b in zip(
        again, [make_clip(sprites, DATA, s) for s in (3, HELD_OUT_SEED + 3)], strict=True
    ):
        for x, y in zip(a, b, strict=True):
            np.testing.assert_array_equal(x, y)
    assert not np.array_equal(again[0].video, again[1].video)


@CONFIGS
def test_video_is_what_the_truth_says(sprites):
    """Repaint every frame pixel by pixel from the clip's positions, colors and shapes."""
    for clip in clips(sprites):
        assert clip.video.shape == (12, 24, 48, 3) and clip.video.dtype == np.uint8
        background = np.array(list(BACKGROUNDS.values())[clip.background], np.uint8)
        for frame, corners in enumerate(clip.positions.astype(int)):
            image = np.broadcast_to(background, (24, 48, 3)).copy()
            owner = np.full((24, 48), -1)
            for sprite, (row, column) in enumerate(corners):
                rgb, mask = draw_sprite(clip.shapes[sprite], clip.colors[sprite], sprites.size)
                box = slice(row, row + sprites.size), slice(column, column + sprites.size)
                image[box][mask] = rgb[mask]
                owner[box][mask] = sprite
            for top, left, bottom, right in clip.occluders:
                image[top:bottom, left:right] = OCCLUDER_COLOR
                owner[top:bottom, left:right] = -1
            np.testing.assert_array_equal(clip.video[frame], image)
            for sprite, shape in enumerate(clip.shapes):
                own = draw_sprite(shape, 0, sprites.size)[1].sum()
                share = (owner == sprite).sum() / own
                np.testing.assert_allclose(clip.visible[frame, sprite], share, rtol=1e-6)


@CONFIGS
def test_numbers_are_in_range_and_sprites_start_clear_of_the_occluders(sprites):
    for clip in clips(sprites):
        count = len(clip.shapes)
        assert sprites.count[0] <= count <= sprites.count[1]
        assert clip.colors.max() < sprites.colors and clip.shapes.max() < sprites.shapes
        room = np.array([24, 48]) - sprites.size
        assert (clip.positions >= 0).all() and (clip.positions <= room).all()
        assert len(clip.occluders) == sprites.occluders
        for _, left, _, right in clip.occluders:
            column = clip.positions[0, :, 1]
            assert ((column + sprites.size <= left) | (column >= right)).all()


def test_sprites_move_at_constant_speed_in_separate_lanes():
    for clip in clips(LANES, 100):
        rows, columns = clip.positions[..., 0], clip.positions[..., 1]
        assert (rows == rows[0]).all()
        assert len(set(rows[0] // 12)) == len(clip.shapes)
        assert (rows[0] % 12 + LANES.size <= 12).all()
        steps = np.abs(np.diff(columns, axis=0))
        speed = steps.max(0)
        assert set(speed) <= {3.0, 4.0}
        turning = (columns[1:] < speed) | (columns[1:] > 48 - LANES.size - speed)
        assert ((steps == speed) | turning).all()


def test_free_sprites_also_move_up_and_down():
    rows = np.concatenate([np.ptp(clip.positions[..., 0], axis=0) for clip in clips(FREE)])
    assert (rows > 5).mean() > 0.5


def test_fractional_speeds_are_drawn_from_the_whole_range():
    sprites = dataclasses.replace(LANES, speed=(1.5, 2.5), occluders=0)
    spans = [np.abs(np.diff(c.positions[..., 1], axis=0)).mean() for c in clips(sprites, 50)]
    assert len(set(spans)) > 10


@CONFIGS
def test_captions_have_number_and_background_and_nothing_else(sprites):
    secrets = {*COLORS, *SHAPES}
    for clip in clips(sprites, 60):
        words = clip.caption.split()
        assert not secrets & set(words)
        assert words[0] == ("one", "two", "three")[len(clip.shapes) - 1]
        assert words[-2] == list(BACKGROUNDS)[clip.background]
        assert len(words) <= tiny_model().text_len


@pytest.mark.parametrize("size", [5, 6, 7, 10])
def test_shapes_are_distinct_and_fill_their_bounding_box(size):
    masks = [draw_sprite(shape, 0, size)[1] for shape in range(len(SHAPES))]
    for mask in masks:
        assert mask[0].any() and mask[-1].any() and mask[:, 0].any() and mask[:, -1].any()
    differences = [(a != b).sum() for a, b in itertools.combinations(masks, 2)]
    assert min(differences) >= size * size / 9


def test_template_can_be_changed_without_changing_later_clips():
    rgb, mask = draw_sprite(0, 1, 7)
    mask[:], rgb[:] = False, 0
    assert draw_sprite(0, 1, 7)[1].all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(size=13), r"sprites\.size=13 is taller than the 12 rows"),
        (dict(count=(1, 4)), r"sprites\.size=7 is taller than the 6 rows"),
        (dict(size=25, vertical=True), r"taller than the 24 rows"),
        (dict(size=3, shapes=5), r"two of the 5 shapes alike"),
        (dict(occluder_width=48), r"occluder_width=48 .*needs 62 columns.*data\.width=48"),
        (dict(occluders=2), r"data\.sprites\.occluders"),
        (dict(occluder_width=17), r"for 2 frames.*frames_per_block=2; raise it to at least 18"),
        (dict(speed=(3.0, 9.0)), r"for 1 frames"),
        (dict(pause=(5, 6)), r"pause=\(5, 6\) .*data\.frames=12; lower it to at most 4 .*least 14"),
        (dict(occluders=0, pause=(0, 2)), r"pause=\(0, 2\) .*need an occluder"),
    ],
)
def test_what_cannot_fit_or_hide_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        check(make_config(**changes))
    assert "\n" not in str(error.value)


def test_occluders_hide_for_longer_than_a_block_at_the_smallest_width_allowed():
    sprites = dataclasses.replace(LANES, speed=(4.0, 4.0))
    data = dataclasses.replace(DATA, frames=48)
    for clip in clips(sprites, 20, data):
        for visible in clip.visible.T:
            hidden = "".join("0" if v == 0 else " " for v in visible[:-4]).split()
            assert all(len(run) > 2 for run in hidden[:-1])


@pytest.mark.parametrize(
    ("sprites", "digest"),
    [(LANES, "2f85a6913f340afb"), (FREE, "112daf6c988aebaf"), (MANY, "a5154afa4d02fb88")],
    ids=["lanes", "free", "many"],
)
def test_clips_without_a_pause_stay_what_they_were(sprites, digest):
    """Digests of clips as the program made them before sprites could rest."""
    found = hashlib.sha256()
    for seed in (*range(20), HELD_OUT_SEED + 5):
        clip = make_clip(sprites, DATA, seed)
        for array in clip[:6]:
            found.update(np.ascontiguousarray(array).tobytes())
        found.update(f"{clip.caption} {clip.background}".encode())
        assert not clip.lamps.any()
    assert found.hexdigest()[:16] == digest


@CONFIGS
def test_a_twin_differs_in_the_given_identity_alone(sprites):
    for seed in range(20):
        clip = make_clip(sprites, DATA, seed)
        identity = [(int(c), int(s)) for c, s in zip(clip.colors, clip.shapes, strict=True)]
        same = make_clip(sprites, DATA, seed, identity)
        np.testing.assert_array_equal(same.video, clip.video)
        color = (identity[0][0] + 1) % sprites.colors
        twin = make_clip(sprites, DATA, seed, [(color, identity[0][1]), *identity[1:]])
        changed = (twin.video != clip.video).any(-1)
        own = (clip.video == list(COLORS.values())[clip.colors[0]]).all(-1)
        assert not (changed & ~own).any()
        for name in ("positions", "occluders", "visible", "lamps", "background", "caption"):
            np.testing.assert_array_equal(getattr(twin, name), getattr(clip, name))
    with pytest.raises(ValueError, match="identities"):
        make_clip(sprites, DATA, 0, [])
