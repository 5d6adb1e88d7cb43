"""Several videos in one picture: all are shown, and the end of the training length."""

import numpy as np
import pytest

from arl2_jax.evaluation.side_by_side import TEXT, side_by_side, timeline
from arl2_jax.generation.video import enlarge


def make_frames(count, height, width, seed=0):
    """Coarse squares of random colors that change from frame to frame."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(256, size=(count, -(-height // 4), -(-width // 4), 3), dtype=np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)[:, :height, :width]


def test_timeline_names_the_parts_that_exist():
    def spans(*lengths):
        return [(part.label, *part[2:]) for part in timeline(*lengths)]

    assert spans(48, 4, 12) == [
        ("given", 0, 4), ("generated", 4, 12), ("beyond training length", 12, 48),
    ]  # fmt: skip
    assert spans(12, 0, 12) == [("generated", 0, 12)]
    assert spans(8, 8, 8) == [("given", 0, 8)]


def places_of(picture, image):
    """Top left corners at which an image lies in a picture."""
    height, width = image.shape[:2]
    starts = np.argwhere((picture == image[0, 0]).all(-1))
    return [
        (y, x) for y, x in starts if np.array_equal(picture[y : y + height, x : x + width], image)
    ]


def test_side_by_side_shows_every_video_and_where_training_ends():
    videos = {name: make_frames(6, 8, 16, seed) for seed, name in enumerate("abcd")}
    videos["d"] = videos["d"][:3]
    shown = side_by_side(videos, given=2, trained=4, width=64)
    assert shown.dtype == np.uint8 and len(shown) == 6
    borders = []
    for t, picture in enumerate(shown):
        corners = [
            places_of(picture, enlarge(v[t : t + 1], 64)[0]) for v in videos.values() if t < len(v)
        ]
        assert all(len(found) == 1 for found in corners) and len({c[0] for c in corners}) == len(
            corners
        )
        y, x = corners[0][0]
        borders.append(tuple(picture[y - 1, x]))
    colors = [part.color for part in timeline(6, 2, 4)]
    assert borders == [color for color in colors for _ in range(2)]
    cursors = [np.flatnonzero((picture[-7] == TEXT).all(-1)).mean() for picture in shown]
    assert (np.diff(cursors) > 0).all()


def test_side_by_side_wants_one_size():
    with pytest.raises(ValueError, match="one size"):
        side_by_side({"a": make_frames(1, 8, 8), "b": make_frames(1, 8, 12)}, given=0, trained=1)
    with pytest.raises(ValueError, match="one size"):
        side_by_side({}, given=0, trained=1)
