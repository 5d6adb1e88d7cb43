"""Sprites rest where the rule says, for as long as the range says, while their occluder is lit."""

import dataclasses
import itertools

import numpy as np
import pytest
from data_sizes import make_data, make_sprites

from arl2_jax.data import make_clip
from arl2_jax.data.sprites import LIT_COLOR, OCCLUDER_COLOR

LANES = make_sprites(pause=(2, 5))
FREE = make_sprites(count=(2, 3), vertical=True, speed=(2.5, 6.0), pause=(0, 4))
MANY = make_sprites(count=(2, 2), occluders=2, occluder_width=11, speed=(1.0, 2.0), pause=(1, 3))
CONFIGS = pytest.mark.parametrize("sprites", [LANES, FREE, MANY], ids=["lanes", "free", "many"])
DATA = make_data(frames=48)


def paths(sprites, seeds=20):
    """(clip with pauses, the same without) of every seed."""
    moving = dataclasses.replace(sprites, pause=(0, 0))
    for seed in range(seeds):
        yield make_clip(sprites, DATA, seed), make_clip(moving, DATA, seed)


def steps_of(clip, moving, sprite):
    """Step of the path without pauses that each frame shows; a path may stand still by rounding."""
    step, steps = 0, []
    for frame, place in enumerate(clip.positions[:, sprite]):
        follows = frame > 0 and (moving.positions[step + 1, sprite] == place).all()
        step += bool(follows)
        assert (moving.positions[step, sprite] == place).all()
        steps.append(step)
    return steps


@pytest.mark.parametrize("sprites", [LANES], ids=["lanes"])
def test_sprites_rest_once_a_passage_near_the_middle(sprites):
    """With whole speeds and one lane each, a frame shows the next step or the same one."""
    lengths = []
    for clip, moving in paths(sprites):
        [(_, left, _, right)] = clip.occluders
        for sprite in range(len(clip.shapes)):
            steps = steps_of(clip, moving, sprite)
            columns = moving.positions[:, sprite, 1]
            inside = (left <= columns) & (columns + sprites.size <= right)
            far = np.abs(columns + sprites.size / 2 - (left + right) / 2)
            for step, frames in itertools.groupby(steps):
                rest = len(list(frames)) - 1
                if not rest or step == steps[-1]:
                    continue
                # Wholly hidden, and no place of the passage is nearer to the middle.
                assert inside[step] and far[step] <= min(far[step - 1], far[step + 1])
                lengths.append(rest)
            # Each passage that is over had a rest: its middle is shown for more than one frame.
            for begin in np.flatnonzero(inside[1:] & ~inside[:-1]) + 1:
                end = begin + int(np.argmin(inside[begin:]))
                if end < steps[-1] and inside[begin:end].all():
                    shown = [steps.count(step) for step in range(begin, end)]
                    assert sum(count > 1 for count in shown) == 1
    assert set(lengths) == {2, 3, 4, 5}


@CONFIGS
def test_occluders_are_lit_while_a_sprite_rests_and_no_longer(sprites):
    for clip, _ in paths(sprites):
        for occluder, (top, left, bottom, right) in enumerate(clip.occluders):
            shown = clip.video[:, top:bottom, left:right].reshape(len(clip.video), -1, 3)
            lit = (shown == LIT_COLOR).all((1, 2))
            np.testing.assert_array_equal(lit, clip.lit[:, occluder])
            assert ((shown == OCCLUDER_COLOR).all((1, 2)) | lit).all()
            behind = (clip.positions[..., 1] >= left) & (
                clip.positions[..., 1] + sprites.size <= right
            )
            still = np.zeros_like(behind)
            still[1:] = (clip.positions[1:] == clip.positions[:-1]).all(-1)
            # Whatever is lit has a hidden sprite that stands still.
            assert (behind & still).any(1)[lit].all()
            if sprites is LANES:  # where nothing but a pause makes a sprite stand still
                np.testing.assert_array_equal((behind & still).any(1), lit)


@CONFIGS
def test_truth_stays_true_with_pauses(sprites):
    for clip, moving in paths(sprites, 10):
        for name in ("colors", "shapes", "occluders", "background", "caption"):
            np.testing.assert_array_equal(getattr(clip, name), getattr(moving, name))
        resting = clip.lit.any(1)
        assert (clip.visible[resting] == 0).any(1).all()


@CONFIGS
def test_a_shorter_clip_is_the_beginning_of_a_longer_one(sprites):
    for seed in range(10):
        short = make_clip(sprites, dataclasses.replace(DATA, frames=20), seed)
        long = make_clip(sprites, DATA, seed)
        np.testing.assert_array_equal(short.video, long.video[:20])
        np.testing.assert_array_equal(short.lit, long.lit[:20])


def test_the_moment_of_coming_out_follows_the_light():
    """The tiny task: one dark frame after the light, then the sprite comes out."""
    sprites = make_sprites(count=(1, 1), size=5, speed=(3.0, 3.0), occluder_width=14, pause=(1, 6))
    data = make_data(frames=40, height=8, width=32, codec_factor=2)
    waits = set()
    for seed in range(40):
        clip = make_clip(sprites, data, seed)
        lit, hidden = clip.lit[:, 0], clip.visible[:, 0] == 0
        for off in np.flatnonzero(lit[:-1] & ~lit[1:])[:-1] + 1:
            waits.add(int(np.argmin(hidden[off:])))
    assert waits == {1}
