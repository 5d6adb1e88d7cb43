"""The autoencoder in bfloat16."""

import dataclasses

import jax.numpy as jnp
import pytest


@pytest.mark.parametrize("function", ["encode", "decode"])
def test_bfloat16_is_near_float32(codec, latents, pixels, error, function):
    """Each rounding to 8 bits is an error of .2 % at random; there are some thirty in a row."""
    half = dataclasses.replace(codec, cfg=dataclasses.replace(codec.cfg, dtype="bfloat16"))
    x = latents if function == "decode" else pixels
    got, wanted = (getattr(c, function)(x) for c in (half, codec))
    assert got.dtype == jnp.float32
    assert 1e-4 < error(got, wanted) < 0.03
