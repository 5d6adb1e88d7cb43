"""Very small autoencoders: one with Wan's strides, and one of two levels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_files import ORIGINAL, as_params, draw_tensors, published_shapes

from arl2_jax.codecs import WanCodec
from arl2_jax.config import VAEConfig
from arl2_jax.weights.layouts.vae import WAN


def random_codec(cfg):
    """Nothing in its parameters is trivially zero or one."""
    return WanCodec(as_params(draw_tensors(published_shapes(cfg, ORIGINAL)), WAN), cfg)


@pytest.fixture(scope="session")
def codec():
    return random_codec(VAEConfig.tiny())


@pytest.fixture(scope="session")
def shallow():
    """Strides of 2 x 2 x 2."""
    return random_codec(VAEConfig.tiny(dim=4, dim_mult=(1, 2), temporal_downsample=(True,)))


@pytest.fixture(scope="session")
def draw():
    """Random numbers of a shape: uniform pixels if it ends with 3, else normal latents."""

    def draw(*shape, seed=0):
        rng = np.random.default_rng(seed)
        pixels = shape[-1] == 3
        return jnp.asarray(
            rng.uniform(-1, 1, shape) if pixels else rng.standard_normal(shape), jnp.float32
        )

    return draw


@pytest.fixture(scope="session")
def latents(codec, draw):
    """Six frames of an odd size."""
    return draw(1, 6, 3, 5, codec.channels)


@pytest.fixture(scope="session")
def pixels(codec, latents):
    """What these latents decode to."""
    return codec.decode(latents)


@pytest.fixture(scope="session")
def compiled():
    """Compiles a function of one frame."""
    return lambda function: jax.jit(function, static_argnums=1, static_argnames="first")
