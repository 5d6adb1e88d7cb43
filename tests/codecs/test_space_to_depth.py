import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax.codecs import SpaceToDepth


def pixels(frames=3, height=8, width=16):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (2, frames, height, width, 3)).astype(np.float32)


def test_rearrangement_is_exact():
    codec, x = SpaceToDepth(4, 48), pixels()
    latents = codec.encode(x)
    assert latents.shape == (2, 3, 2, 4, 48)
    np.testing.assert_array_equal(codec.decode(latents), x)


def test_latent_holds_the_pixels_of_its_square():
    x = pixels()
    latents = SpaceToDepth(4, 48).encode(x)
    np.testing.assert_array_equal(latents[1, 2, 1, 3].reshape(4, 4, 3), x[1, 2, 4:8, 12:16])


def test_lift_has_wan_shapes_and_is_isometric():
    codec, x = SpaceToDepth(2, 16), pixels()
    latents = codec.encode(x)
    assert latents.shape == (2, 3, 4, 8, 16) and latents.dtype == np.float32
    np.testing.assert_allclose(codec.decode(latents), x, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(latents), np.linalg.norm(x), rtol=1e-6)


@pytest.mark.parametrize(("factor", "channels"), [(4, 48), (2, 16)])
def test_jax_and_jit_agree_with_numpy(factor, channels):
    codec, x = SpaceToDepth(factor, channels), pixels()
    latents = jax.jit(codec.encode)(jnp.asarray(x))
    np.testing.assert_allclose(latents, codec.encode(x), atol=1e-6)
    np.testing.assert_allclose(jax.jit(codec.decode)(latents), x, atol=1e-6)


def test_keeps_the_number_of_frames():
    codec = SpaceToDepth(2, 16)
    assert codec.pixel_frames(7) == codec.latent_frames(7) == 7
