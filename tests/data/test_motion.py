"""Sprites rest where and as long as they should, and lamps are lit before they come out."""

import dataclasses
import itertools

import numpy as np
import pytest
from data_sizes import make_data, make_sprites

from arl2_jax.data import make_clip
from arl2_jax.data.sprites import LAMP_COLOR, OCCLUDER_COLOR

LANES = make_sprites(pause=(2, 5), lamp=2)
FREE = make_sprites(count=(2, 3), vertical=True, speed=(2.5, 6.0), pause=(0, 4), lamp=3)
MANY = make_sprites(
    count=(2, 2), occluders=2, occluder_width=11, speed=(1.0, 2.0), pause=(1, 3), lamp=1
)
CONFIGS = pytest.mark.parametrize("sprites", [LANES, FREE, MANY], ids=["lanes", "free", "many"])
DATA = make_data(frames=48)


def paths(sprites, seeds=20):
    """(clip with pauses, the same without) of every seed."""
    moving = dataclasses.replace(sprites, pause=(0, 0), lamp=0)
    for seed in range(seeds):
        yield make_clip(sprites, DATA, seed), make_clip(moving, DATA, seed)


def steps_of(clip, moving, sprite):
    """Step of the path without pauses that each frame shows; rounding may repeat a position."""
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
def test_a_lamp_is_lit_just_before_a_sprite_comes_out(sprites):
    """In its rows, at the edge where it will be seen; and nothing else is lit."""
    for seed in range(20):
        clip = make_clip(sprites, DATA, seed)
        later = make_clip(sprites, dataclasses.replace(DATA, frames=60), seed).positions
        burning = np.zeros(clip.video.shape[:3], bool)
        for sprite, (_, left, _, right) in itertools.product(
            range(len(clip.shapes)), clip.occluders
        ):
            column = later[:, sprite, 1]
            hidden = (left <= column) & (column + sprites.size <= right)
            for frame in np.flatnonzero(hidden[: len(clip.video)]):
                wait = int(np.argmin(hidden[frame:]))
                box = clip.lamps[frame, sprite]
                if wait > sprites.lamp:
                    assert not box.any()
                    continue
                outside = column[frame + wait] + sprites.size > right
                row = int(later[frame, sprite, 0])
                edge = (right - 2, right) if outside else (left, left + 2)
                assert box.tolist() == [row, edge[0], row + sprites.size, edge[1]]
                burning[frame, row : row + sprites.size, slice(*edge)] = True
        np.testing.assert_array_equal((clip.video == LAMP_COLOR).all(-1), burning)
        for top, left, bottom, right in clip.occluders:
            behind = clip.video[:, top:bottom, left:right]
            dark = (behind == OCCLUDER_COLOR).all(-1)
            np.testing.assert_array_equal(dark, ~burning[:, top:bottom, left:right])


@CONFIGS
def test_truth_stays_true_with_pauses(sprites):
    for clip, moving in paths(sprites, 10):
        for name in ("colors", "shapes", "occluders", "background", "caption"):
            np.testing.assert_array_equal(getattr(clip, name), getattr(moving, name))
        assert (clip.visible[clip.lamps.any(-1)] == 0).all()


@CONFIGS
def test_a_shorter_clip_is_the_beginning_of_a_longer_one(sprites):
    for seed in range(10):
        short = make_clip(sprites, dataclasses.replace(DATA, frames=20), seed)
        long = make_clip(sprites, DATA, seed)
        np.testing.assert_array_equal(short.video, long.video[:20])
        np.testing.assert_array_equal(short.lamps, long.lamps[:20])
