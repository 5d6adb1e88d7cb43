"""Codecs between pixels and latents, and loading of their weights."""

from arl2_jax.codecs.interface import Codec
from arl2_jax.codecs.load import load_wan_codec, make_codec, vae_weights
from arl2_jax.codecs.space_to_depth import SpaceToDepth
from arl2_jax.codecs.wan_vae import WanCodec

__all__ = ["Codec", "SpaceToDepth", "WanCodec", "load_wan_codec", "make_codec", "vae_weights"]
