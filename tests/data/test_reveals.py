"""Reveals follow their definition, and clips for the recall test come in balanced pairs."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from data_sizes import make_data, make_sprites, tiny_model

from arl2_jax.config import Config
from arl2_jax.data import SpriteClip, draw_sprite, make_clip, reveal_clips, reveals
from arl2_jax.errors import ConfigError

LANES = make_sprites()
DATA = make_data()


def make_config(frames=12, **changes):
    sprites = dataclasses.replace(LANES, **changes)
    return Config(tiny_model(), data=make_data(sprites=sprites, frames=frames))


def brute_force_reveals(visible, f):
    """The definition, spelt out frame by frame."""
    frames, count = visible.shape
    found = []
    for block in range(2, frames // f):
        for sprite in range(count):
            v = visible[:, sprite]
            before = range((block - 1) * f, block * f)
            last = block * f + f - 1
            hidden_runs = [
                range(a, b)
                for a in range(frames)
                for b in range(a + f + 1, frames + 1)
                if not v[a:b].any() and set(before) <= set(range(a, b))
            ]
            seen = any(v[t] == 1 for t in range(before[0]))
            if hidden_runs and seen and v[last] == 1:
                hidden = max(hidden_runs, key=len)
                lag = sum(set(range(b * f, b * f + f)) <= set(hidden) for b in range(block))
                found.append((block, sprite, last, lag))
    return found


@pytest.mark.parametrize("f", [1, 2, 3, 4])
def test_reveals_follow_their_definition(f):
    rng = np.random.default_rng(f)
    total = 0
    for _ in range(60):
        runs = rng.choice([0, 0.5, 1], 12, p=[0.45, 0.1, 0.45]).repeat(rng.integers(1, 5, 12))[:24]
        visible = np.stack([runs, rng.permutation(runs)], 1)[: len(runs) // f * f]
        clip = make_clip(LANES, DATA, 0)._replace(visible=visible)
        found = reveals(clip, f)
        assert [tuple(reveal) for reveal in found] == brute_force_reveals(visible, f)
        total += len(found)
    assert total > 5


def test_reveal_needs_more_than_a_hidden_block():
    visible = np.array([[1, 1, 0, 0, 1, 1, 1, 1]], float).T
    clip = make_clip(LANES, DATA, 0)
    assert reveals(clip._replace(visible=visible), 2) == []
    visible[1] = 0
    assert reveals(clip._replace(visible=visible), 2) == [(2, 0, 5, 1)]


@pytest.mark.parametrize(
    ("seen", "lag"),
    [("110000110011", 2), ("100000111100", 2), ("101000000011", 3), ("1000000000.1", 4)],
)
def test_lag_counts_whole_hidden_blocks(seen, lag):
    """Blocks of two frames; what is hidden before the first whole block does not count."""
    visible = np.array([[0.5 if v == "." else float(v) for v in seen]]).T
    clip = make_clip(LANES, DATA, 0)._replace(visible=visible)
    assert reveals(clip, 2)[0].lag == lag


@pytest.fixture(scope="module")
def found():
    return reveal_clips(make_config(pause=(0, 8), count=(1, 2), frames=24), 96)


def test_reveal_clips_are_held_out_and_hold_their_event(found):
    for clip, event in zip(*found, strict=True):
        assert isinstance(clip, SpriteClip) and event in reveals(clip, 2)
        rgb, mask = draw_sprite(clip.shapes[event.sprite], clip.colors[event.sprite], 7)
        row, column = clip.positions[event.frame, event.sprite].astype(int)
        shown = clip.video[event.frame, row : row + 7, column : column + 7]
        np.testing.assert_array_equal(shown[mask], rgb[mask])


def test_neighbors_are_twins(found):
    clips, events = found
    assert len(clips) == len(events) == 96
    for one, other, event, same in zip(
        clips[::2], clips[1::2], events[::2], events[1::2], strict=True
    ):
        assert event == same
        assert one.colors[event.sprite] != other.colors[event.sprite]
        assert one.shapes[event.sprite] != other.shapes[event.sprite]
        rest = np.arange(len(one.colors)) != event.sprite
        np.testing.assert_array_equal(one.colors[rest], other.colors[rest])
        np.testing.assert_array_equal(one.shapes[rest], other.shapes[rest])
        for name in ("positions", "occluders", "lamps", "background", "caption"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        # What share of a sprite is seen depends on its shape; whether it is hidden does not.
        np.testing.assert_array_equal(one.visible == 0, other.visible == 0)


def test_no_two_pairs_are_of_one_clip(found):
    videos = {clip.positions.tobytes() + clip.occluders.tobytes() for clip in found[0][::2]}
    assert len(videos) == 48


def test_identities_and_lags_are_balanced(found):
    clips, events = found
    each = [(c.colors[e.sprite], c.shapes[e.sprite]) for c, e in zip(clips, events, strict=True)]
    for side in (each[::2], each[1::2]):  # 48 pairs, 12 identities
        assert set(Counter(side).values()) == {4}
    lags = Counter(event.lag for event in events)
    assert len(lags) > 3 and max(lags.values()) - min(lags.values()) <= 2
    # Lag and identity are not the same order: a lag does not tell the identity.
    assert len({(event.lag, identity) for event, identity in zip(events, each, strict=True)}) > 40


def test_with_one_shape_twins_differ_in_color():
    clips, events = reveal_clips(make_config(shapes=1, count=(1, 1)), 16)
    for one, other, event in zip(clips[::2], clips[1::2], events[::2], strict=True):
        assert one.colors[event.sprite] != other.colors[event.sprite]
    with pytest.raises(ValueError, match="even"):
        reveal_clips(make_config(), 3)


def test_no_reveals_is_an_error():
    config = make_config(occluders=0)
    with pytest.raises(ConfigError, match=r"evaluation\.recall_clips=0"):
        reveal_clips(config, 2)
