"""Rotary positions against float64, at any distance from the start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax.nn.rope import Rope, axis_widths, rope_angles, rotate, sequence_rope, video_rope

POSITIONS = (0, 5, 1023, 1024, 10**6, 2**31 - 100)


@pytest.mark.parametrize("width", [2, 8, 44, 128])
def test_angles_are_exact_at_any_position(width):
    angles = rope_angles(jnp.asarray(POSITIONS, jnp.int32), width)
    # Position times frequency is held exactly by longdouble up to 2^31 times 2^-53 of a turn.
    frequencies = np.longdouble(10000) ** (-np.arange(0, width, 2, dtype=np.longdouble) / width)
    wanted = np.outer(np.asarray(POSITIONS, np.longdouble), frequencies)
    difference = np.abs(np.exp(1j * np.float64(angles)) - np.exp(1j * wanted).astype(complex))
    assert np.all(np.abs(angles) <= np.float32(np.pi))
    # The float32 angle in [-pi, pi) is rounded to 2^-23 of pi at most.
    assert difference.max() < 5e-7


@pytest.mark.parametrize(
    ("head_dim", "widths"),
    [(128, (44, 42, 42)), (64, (24, 20, 20)), (10, (6, 2, 2)), (6, (2, 2, 2)), (8, (4, 2, 2))],
)
def test_axes_share_the_head(head_dim, widths):
    assert axis_widths(head_dim) == widths
    assert sum(widths) == head_dim


@pytest.mark.parametrize("first", POSITIONS)
def test_video_rope_against_float64(first):
    frames, rows, columns, width = 2, 3, 5, 128
    found = jax.jit(video_rope, static_argnums=(1, 2, 3, 4))(
        jnp.int32(first), frames, rows, columns, width
    )
    place = np.indices((frames, rows, columns)).reshape(3, -1).T + np.asarray((first, 0, 0))
    wanted = np.concatenate(
        [
            np.outer(place[:, axis], 10000.0 ** (-np.arange(0, size, 2) / size))
            for axis, size in enumerate((44, 42, 42))
        ],
        axis=1,
    )
    # float64 itself is off by 2^31 * 2^-53 = 2e-7 at the last position.
    np.testing.assert_allclose(found.cos, np.cos(wanted), atol=1e-6)
    np.testing.assert_allclose(found.sin, np.sin(wanted), atol=1e-6)


def test_pairs_are_neighbours():
    x = np.random.default_rng(0).standard_normal((1, 4, 2, 8)).astype(np.float32)
    angles = np.linspace(-3, 3, 16).reshape(4, 4).astype(np.float32)
    found = rotate(jnp.asarray(x), Rope(jnp.cos(angles), jnp.sin(angles)))
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(found[..., 0::2], turned.real, atol=1e-6)  # float32
    np.testing.assert_allclose(found[..., 1::2], turned.imag, atol=1e-6)
    np.testing.assert_array_equal(rotate(jnp.asarray(x), None), x)
    assert rotate(jnp.asarray(x, jnp.bfloat16), sequence_rope(0, 4, 8)).dtype == jnp.bfloat16


@pytest.mark.parametrize("shift", [1, 1024, 10**9])
def test_products_depend_on_distance_alone(shift):
    q, k = np.random.default_rng(1).standard_normal((2, 1, 6, 1, 16)).astype(np.float32)

    def scores(first):
        rope = sequence_rope(first, 6, 16)
        return jnp.einsum("bqhd,bkhd->qk", *(rotate(jnp.asarray(x), rope) for x in (q, k)))

    np.testing.assert_allclose(scores(shift), scores(0), atol=5e-6)  # sums of 16 float32 products
    assert np.abs(scores(0) - jnp.einsum("bqhd,bkhd->qk", q, k)).max() > 0.1
