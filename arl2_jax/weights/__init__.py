"""Import of released weights, and export of parameters in the layouts of other programs."""

from arl2_jax.weights.checksums import checksum
from arl2_jax.weights.export import export_params
from arl2_jax.weights.facts import model_config, umt5_config, vae_config
from arl2_jax.weights.load import load_params, load_text_encoder, load_vae
from arl2_jax.weights.release import Release, find_release
from arl2_jax.weights.tensors import fingerprint

__all__ = [
    "Release",
    "checksum",
    "export_params",
    "find_release",
    "fingerprint",
    "load_params",
    "load_text_encoder",
    "load_vae",
    "model_config",
    "umt5_config",
    "vae_config",
]
