"""Pictures in tiles: the same picture, exactly where one tile holds it all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax.models.vae.tiling import make_tiles, over_tiles


@pytest.mark.parametrize("scale", [1, 8])
@pytest.mark.parametrize(
    ("length", "size"), [(1, 4), (2, 2), (9, 8), (15, 8), (16, 8), (17, 3), (60, 32), (104, 32)]
)
def test_tiles_cover_an_axis(length, size, scale):
    width, starts, weights = make_tiles(length, size, scale)
    assert width == min(size, length)
    assert starts[0] == 0 and starts[-1] == length - width
    steps = np.diff(starts)
    assert (steps > 0).all() and (steps <= width - max(1, width // 4)).all()
    total = np.zeros(length * scale)
    for start, share in zip(starts, weights, strict=True):
        total[start * scale : (start + width) * scale] += share
    np.testing.assert_allclose(total, 1, atol=1e-6)  # float32 weights


def test_neighbours_fade_linearly():
    _, starts, weights = make_tiles(14, 8, 1)
    assert list(starts) == [0, 6]
    np.testing.assert_allclose(weights[0], [1, 1, 1, 1, 1, 1, 0.75, 0.25])
    np.testing.assert_allclose(weights[1], weights[0][::-1])


@pytest.mark.parametrize(("height", "width", "tile"), [(5, 7, (2, 3)), (4, 3, (99, 2))])
def test_local_functions_are_not_changed(draw, height, width, tile):
    """Odd sizes, tiles larger than the picture; rows and columns are enlarged."""
    x = draw(2, 3, 2 * height, 2 * width, 4)
    double = lambda x: jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)[..., :3] ** 2
    compute = lambda part, state: (double(part), state)
    got, _ = over_tiles(compute, x, (), tile, source=2, target=4)
    np.testing.assert_allclose(got, double(x), rtol=1e-6)  # float32 weights that add up to 1


def test_one_tile_is_the_whole_picture_exactly(codec, latents, pixels):
    tiled = dataclasses.replace(codec, tile=(99, 5))
    np.testing.assert_array_equal(tiled.decode(latents), pixels)
    np.testing.assert_array_equal(tiled.encode(pixels), codec.encode(pixels))


@pytest.mark.parametrize("tile", [(2, 3), (99, 99)])
def test_a_stream_in_tiles_is_the_clip_in_tiles(codec, latents, tile):
    tiled = dataclasses.replace(codec, tile=tile)
    state, parts = tiled.init_state(1, *latents.shape[2:4]), []
    for t in range(0, latents.shape[1], 3):
        part, state = tiled.decode_block(latents[:, t : t + 3], state, first=t == 0)
        parts.append(part)
    np.testing.assert_array_equal(jnp.concatenate(parts, axis=1), tiled.decode(latents))


def test_tiles_differ_from_the_whole_only_near_their_ends(shallow, draw, error):
    """Two tiles, rows 0 to 24 and 18 to 42; a latent has influence over 12 rows and no more.

    Attention sees all of its tile, so it is left out. The content is smooth: one wave.
    """
    mute = lambda path, x: x * 0 if "proj" in str(path) else x
    params = jax.tree_util.tree_map_with_path(mute, shallow.params)
    whole = dataclasses.replace(shallow, params=params)
    tiled = dataclasses.replace(whole, tile=(24, 8))
    wave = lambda rows: np.sin(np.linspace(0, 2 * np.pi, rows))[:, None, None]
    latents = wave(42) * draw(1, 2, 1, 5, shallow.channels)
    pixels = wave(84) * draw(1, 3, 1, 10, 3)
    for function, x, scale in (("decode", latents, 2), ("encode", pixels, 1)):
        got, wanted = (getattr(c, function)(x) for c in (tiled, whole))
        for rows in (slice(0, 12 * scale), slice(30 * scale, None)):
            # float32 sums in another order.
            np.testing.assert_allclose(got[:, :, rows], wanted[:, :, rows], atol=2e-6)
        # Where the tiles meet, each misses what lies beyond its end.
        assert 1e-3 < error(got, wanted) < 0.1
