"""The path between data and noise, and what its flow implies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax.diffusion import add_noise, draw_levels, predict_x0, shift_noise_levels


@pytest.fixture(scope="module")
def latents():
    return jax.random.normal(jax.random.key(0), (2, 3, 4, 2, 2, 5))[:2]


def test_path_goes_from_data_to_noise(latents):
    x0, eps = latents
    level = lambda s: jnp.full(x0.shape[:2], s)
    np.testing.assert_array_equal(add_noise(x0, eps, level(0.0)), x0)
    np.testing.assert_array_equal(add_noise(x0, eps, level(1.0)), eps)
    # Its derivative is the flow, the same at every level.
    slope = jax.jvp(lambda s: add_noise(x0, eps, s), (level(0.3),), (level(1.0),))[1]
    np.testing.assert_allclose(slope, eps - x0, rtol=1e-6)


def test_flow_implies_the_data(latents):
    x0, eps = latents
    s = jnp.linspace(0, 1, 12).reshape(3, 4)  # one for each frame
    # One rounding of each product.
    np.testing.assert_allclose(predict_x0(add_noise(x0, eps, s), eps - x0, s), x0, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_shift_keeps_the_ends_and_rises(shift):
    s = np.linspace(0, 1, 101)
    shifted = shift_noise_levels(s, shift)
    assert shifted[0] == 0 and shifted[-1] == pytest.approx(1) and np.all(np.diff(shifted) > 0)
    # Odds s / (1 - s) are multiplied by the shift; float64, less what 1 - s loses near 1.
    np.testing.assert_allclose(
        shifted[1:-1] / (1 - shifted[1:-1]), shift * s[1:-1] / (1 - s[1:-1]), rtol=1e-9
    )


def test_levels_are_shifted_uniform_and_equal_within_a_block():
    s = np.asarray(draw_levels(jax.random.key(0), 500, 8, 3, 5.0)).reshape(500, 8, 3)
    assert np.all(s == s[..., :1])
    uniform = np.sort(s[..., 0].ravel() / (5 - 4 * s[..., 0].ravel()))
    # Largest gap between the distribution of 4000 draws and the uniform one: 1.95 / sqrt(4000) is
    # passed by one seed in a thousand.
    assert np.abs(uniform - (np.arange(4000) + 0.5) / 4000).max() < 0.031
