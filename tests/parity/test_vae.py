"""Our autoencoder is Wan's, as Diffusers has it: float32 on the CPU.

Errors are some 1e-6 where sums are taken in another order; the bound is ten times as much.
"""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from parity.vae import decode, diffusers_vae, encode
from vae_files import DIFFUSERS, GOLDEN, ORIGINAL, as_params, draw_tensors, published_shapes

from arl2_jax.codecs import WanCodec
from arl2_jax.config import VAEConfig
from arl2_jax.weights.layouts.vae import WAN, layouts

pytestmark = pytest.mark.parity

CLOSE = 1e-5
# Wan's levels and blocks, which its converter takes for granted.
WAN_LEVELS = VAEConfig.tiny(dim=6, dim_mult=(1, 2, 4, 4), num_res_blocks=2, z_dim=16)
# Model, then videos, latent frames, rows and columns.
CASES = {
    "wan's levels": (WAN_LEVELS, (1, 4, 3, 5)),
    "tiny": (VAEConfig.tiny(), (2, 3, 5, 2)),
    "three levels": (GOLDEN, (1, 5, 2, 7)),
    "no time": (VAEConfig.tiny(dim=7, temporal_downsample=3 * (False,)), (3, 1, 1, 1)),
    "a single level": (VAEConfig.tiny(dim_mult=(2,), temporal_downsample=()), (1, 1, 6, 4)),
    "released": (VAEConfig(dtype="float32"), (1, 2, 3, 2)),
}


def load(network, tensors):
    network.load_state_dict({name: torch.as_tensor(x) for name, x in tensors.items()})
    return network


def assert_same(codec, network, size, error):
    cfg, rng, (batch, frames, rows, columns) = codec.cfg, np.random.default_rng(0), size
    factor, count = codec.spatial_factor, codec.pixel_frames(frames)
    pixels = rng.uniform(-1, 1, (batch, count, rows * factor, columns * factor, 3))
    pixels, latents = np.float32(pixels), np.float32(rng.standard_normal((*size, cfg.z_dim)))
    assert error(codec.encode(pixels), encode(network, cfg, pixels)) < CLOSE
    wanted = decode(network, cfg, latents)
    assert np.mean(np.abs(wanted) < 1) > 0.5  # the others are clipped and would hide errors
    assert error(codec.decode(latents), wanted) < CLOSE


@pytest.mark.parametrize("name", CASES)
def test_encode_and_decode(name, error):
    cfg, size = CASES[name]
    network = diffusers_vae(cfg)
    shapes = {name: tuple(x.shape) for name, x in network.state_dict().items()}
    assert shapes == published_shapes(cfg, DIFFUSERS)
    tensors = draw_tensors(shapes)
    codec = WanCodec(as_params(tensors, layouts(cfg)[1]), cfg)
    assert_same(codec, load(network, tensors), size, error)


def test_original_names(error):
    """The original layout, through Diffusers' own converter, is the same model."""
    tensors = draw_tensors(published_shapes(WAN_LEVELS, ORIGINAL))
    network = load(diffusers_vae(WAN_LEVELS), convert_wan_vae_to_diffusers(dict(tensors)))
    assert_same(WanCodec(as_params(tensors, WAN), WAN_LEVELS), network, (2, 3, 2, 3), error)


def test_both_layouts_are_one_model():
    converted = convert_wan_vae_to_diffusers(draw_tensors(published_shapes(WAN_LEVELS, ORIGINAL)))
    original = as_params(draw_tensors(published_shapes(WAN_LEVELS, ORIGINAL)), WAN)
    jax.tree.map(
        np.testing.assert_array_equal, as_params(converted, layouts(WAN_LEVELS)[1]), original
    )


def test_bfloat16(error):
    """As near to float32 as Diffusers' own bfloat16, which rounds more often (.024 and .028)."""
    cfg = dataclasses.replace(WAN_LEVELS, dtype="bfloat16")
    tensors = draw_tensors(published_shapes(cfg, DIFFUSERS))
    network = load(diffusers_vae(cfg), tensors)
    latents = np.float32(np.random.default_rng(0).standard_normal((1, 3, 3, 5, 16)))
    wanted = decode(network, cfg, latents)
    got = WanCodec(as_params(tensors, layouts(cfg)[1]), cfg).decode(latents)
    theirs = decode(network.to(torch.bfloat16), cfg, latents)
    assert error(got, wanted) < error(theirs, wanted)
