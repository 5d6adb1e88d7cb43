"""Shapes and types at every size, and what is refused before anything is compiled."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_files import GOLDEN

from arl2_jax.config import VAEConfig
from arl2_jax.models import vae


@pytest.mark.parametrize(
    ("cfg", "latents", "pixels"),
    [
        (VAEConfig(), (1, 21, 60, 104, 16), (1, 81, 480, 832, 3)),
        (VAEConfig(), (3, 1, 3, 5, 16), (3, 1, 24, 40, 3)),
        (VAEConfig.tiny(), (1, 5, 1, 1, 4), (1, 17, 8, 8, 3)),
        (GOLDEN, (2, 3, 3, 1, 3), (2, 5, 12, 4, 3)),
        (VAEConfig.tiny(dim_mult=(1,), temporal_downsample=()), (1, 3, 5, 7, 4), (1, 3, 5, 7, 3)),
    ],
)
def test_latents_and_pixels_correspond(cfg, latents, pixels):
    params = vae.vae_shapes(cfg)
    for function, given, wanted in (
        (vae.encode, pixels, latents),
        (vae.decode, latents, pixels),
    ):
        x = jax.ShapeDtypeStruct(given, jnp.float32)
        got = jax.eval_shape(lambda p, x, f=function: f(p, cfg, x), params, x)
        assert (got.shape, got.dtype) == (wanted, jnp.float32)


@pytest.mark.parametrize("latent_frames", [1, 2, 5, 21])
def test_numbers_of_frames_are_inverse(codec, latent_frames):
    pixel_frames = codec.pixel_frames(latent_frames)
    assert pixel_frames == 4 * latent_frames - 3
    assert codec.latent_frames(pixel_frames) == latent_frames
    assert codec.latent_frames(pixel_frames + 3) == latent_frames
    assert (codec.spatial_factor, codec.channels) == (8, 4)


def test_state_is_of_the_compute_type_and_does_not_grow():
    cfg = VAEConfig()
    state = jax.eval_shape(lambda: vae.init_decoder_state(cfg, 1, 60, 104))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("bfloat16")}
    latent = jax.ShapeDtypeStruct((1, 60, 104, 16), jnp.float32)
    for first in (True, False):
        decode = functools.partial(vae.decode_frame, first=first)
        after = jax.eval_shape(lambda p, z, s, d=decode: d(p, cfg, z, s), vae.vae_shapes(cfg),
                               latent, state)[1]  # fmt: skip
        assert after == state


def test_parameters_are_as_many_as_published():
    """Wan2.1_VAE.pth has 508 MB in float32."""
    leaves = jax.tree.leaves(vae.vae_shapes(VAEConfig()))
    assert sum(leaf.size for leaf in leaves) == 126_892_531


def test_initial_parameters_have_unit_gain():
    cfg = VAEConfig.tiny(dim=16, dtype="bfloat16")
    params = vae.init_vae(cfg, jax.random.key(0))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, vae.vae_shapes(cfg))
    kernel = params["decoder"]["middle"]["0"]["conv1"]["kernel"].astype(jnp.float32)
    assert np.std(kernel) * (27 * 32) ** 0.5 == pytest.approx(1, rel=0.02)
    other = params["encoder"]["middle"]["0"]["conv1"]["kernel"]
    assert not np.array_equal(kernel, other)
    assert (params["encoder"]["norm_out"]["scale"] == 1).all()


# Shape of what is encoded or decoded, and what the refusal must name.
PIXELS = {
    (1, 5, 12, 16, 3): ["12 x 16", "multiples of 8", "crop"],
    (1, 5, 16, 20, 3): ["16 x 20", "multiples of 8"],
    (1, 4, 16, 16, 3): ["4 frames", "1 + a multiple of 4", "drop 3 of them"],
    (1, 0, 16, 16, 3): ["pixels"],
    (5, 16, 16, 3): ["(5, 16, 16, 3)", "[batch, frames, rows, columns, 3]"],
    (1, 5, 16, 16, 4): ["(1, 5, 16, 16, 4)"],
}
LATENTS = {
    (1, 2, 3, 5, 5): ["(1, 2, 3, 5, 5)", "z_dim=4"],
    (2, 3, 5, 4): ["(2, 3, 5, 4)"],
    (1, 0, 3, 5, 4): ["(1, 0, 3, 5, 4)"],
}


@pytest.mark.parametrize(
    ("function", "shape", "parts"),
    [
        *(("encode", shape, parts) for shape, parts in PIXELS.items()),
        *(("decode", shape, parts) for shape, parts in LATENTS.items()),
    ],
)
def test_wrong_sizes_are_named(codec, function, shape, parts, unchecked):
    with pytest.raises(ValueError) as error:
        getattr(codec, function)(np.zeros(shape, np.float32))
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts)


def test_wrong_runs_and_states_are_named(codec, unchecked):
    params, cfg = codec.params, codec.cfg
    state = vae.init_encoder_state(cfg, 1, 2, 2)
    with pytest.raises(ValueError, match=r"2 frames; with first=False .* made of 4"):
        vae.encode_frame(params, cfg, np.zeros((1, 2, 16, 16, 3)), state, first=False)
    with pytest.raises(ValueError, match=r"\(1, 16, 24\) in float32.*init_encoder_state"):
        vae.encode_frame(params, cfg, np.zeros((1, 1, 16, 24, 3)), state, first=True)
    half = dataclasses.replace(cfg, dtype="bfloat16")
    state = vae.init_decoder_state(half, 1, 2, 2)
    with pytest.raises(ValueError, match=r"\(1, 2, 2\) in float32.*init_decoder_state"):
        vae.decode_frame(params, cfg, np.zeros((1, 2, 2, 4)), state, first=True)
    for tile in ((1, 4), (0, 0)):
        with pytest.raises(ValueError, match=r"tile=.* at least 2 x 2"):
            vae.decode(params, cfg, np.zeros((1, 1, 4, 4, 4)), tile=tile)
