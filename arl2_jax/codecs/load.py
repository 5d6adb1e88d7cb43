"""The codec of a run, and Wan's autoencoder with its weights.

`arl2_jax.weights` is imported inside the functions that read files, so that code which only uses a
codec does not load Orbax and safetensors.
"""

import dataclasses

import jax

from arl2_jax.codecs.interface import Codec
from arl2_jax.codecs.space_to_depth import SpaceToDepth
from arl2_jax.codecs.wan_vae import WanCodec
from arl2_jax.config import Config
from arl2_jax.errors import ConfigError


def make_codec(config: Config) -> Codec | None:
    """Make the codec that `config.data.codec` names, for the channels of `config.model`.

    Returns:
      The codec. None for Wan's autoencoder if `config.data.vae` names no weights: then stored
      latents can be trained on, but not decoded.

    Raises:
      ConfigError: the codec does not fit the model.
      WeightsError: its weights cannot be read.
    """
    model, data = config.model, config.data
    if model.in_dim != model.out_dim:
        raise ConfigError(
            f"must equal model.in_dim={model.in_dim}: the codec decodes the model's output",
            field="model.out_dim",
            value=model.out_dim,
        )
    if data.codec == "space_to_depth":
        return SpaceToDepth(data.codec_factor, model.in_dim)
    if not data.vae:
        return None
    codec = load_wan_codec(data.vae)
    for field, value, wanted in (
        ("data.codec_factor", data.codec_factor, codec.spatial_factor),
        ("model.in_dim", model.in_dim, codec.channels),
    ):
        if value != wanted:
            raise ConfigError(
                f"must be {wanted}, as in data.vae={data.vae}", field=field, value=value
            )
    return codec


def load_wan_codec(
    path: str, dtype: str | None = None, tile: tuple[int, int] | None = None
) -> WanCodec:
    """Load Wan's autoencoder from a file or folder onto the default device.

    Args:
      path: weights in any layout that `arl2_jax.weights` reads, or a release that includes them.
      dtype: type of the convolutions; by default bfloat16, or float32 on CPUs.
      tile: rows and columns of latents that are computed together; by default all.

    Raises:
      WeightsError: the weights cannot be read, or belong to another network.
    """
    from arl2_jax.weights import load_vae, vae_config

    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    weights = vae_weights(path)
    cfg = dataclasses.replace(vae_config(weights), dtype=dtype)
    return WanCodec(load_vae(weights, cfg), cfg, tile)


def vae_weights(path: str) -> str:
    """Return the autoencoder's weights in a release's folder, else `path` itself."""
    from arl2_jax.weights import find_release

    return str(find_release(path).vae or path)
