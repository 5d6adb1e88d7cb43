"""Writes a release of Wan2.1 1.3B with random weights: every file a prompt needs, at full size.

    python benchmarks/random_release.py --out=random-release
    python launch/generate.py --weights=random-release --prompt="a corgi surfing"

It tests a machine and the program, not a model: the videos are noise. It takes 18 GB of disk. The
tokenizer knows only single characters. --small writes tiny networks.
"""

import json
import string
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
from absl import app, flags
from flax import traverse_util

from arl2_jax.config import ModelConfig, UMT5Config, VAEConfig
from arl2_jax.models import param_shapes
from arl2_jax.models.umt5 import umt5_shapes
from arl2_jax.models.vae import vae_shapes
from arl2_jax.weights import export_params
from arl2_jax.weights.layouts import umt5, vae
from arl2_jax.weights.read import export_tensors
from arl2_jax.weights.safetensors_file import write_file

_OUT = flags.DEFINE_string("out", None, "Folder to write.", required=True)
_SMALL = flags.DEFINE_bool("small", False, "Tiny networks.")


def random_tree(shapes: Any) -> Any:
    """Numbers that keep activations of about 1: a million normal ones, over and over."""
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32)

    def fill(path, leaf):
        name = path[-1].key
        scale = {"scale": 0.1, "bias": 0.1}.get(name, max(np.prod(leaf.shape[:-1]), 1) ** -0.5)
        values = np.asarray((name == "scale") + noise * scale, leaf.dtype)
        return np.resize(values, leaf.shape)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def write_encoder(folder: Path, name: str, params: Any, layout, config: dict) -> None:
    """One of the networks around the transformer, in the layout of a Diffusers pipeline."""
    folder.mkdir()
    write_file(folder / name, export_tensors(traverse_util.flatten_dict(params, sep="/"), layout))
    (folder / "config.json").write_text(json.dumps(config))


def write_tokenizer(folder: Path) -> None:
    """Characters, with the special tokens of T5."""
    known = ["<pad>", "</s>", "<unk>", *string.printable]
    pieces = [(piece, -1.0) for piece in known]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))


def main(_):
    """Write the four parts of a pipeline."""
    small, out = _SMALL.value, Path(_OUT.value)
    model = ModelConfig.tiny(in_dim=4, out_dim=4) if small else ModelConfig.wan1p3b()
    text = UMT5Config.tiny(text_len=32) if small else UMT5Config()
    autoencoder = VAEConfig.tiny() if small else VAEConfig()
    out.mkdir(parents=True)
    teacher = model.teacher()
    export_params(out / "transformer", random_tree(param_shapes(teacher)), teacher, "diffusers")
    config = {"num_heads": text.num_heads, "d_kv": text.head_dim}
    config["relative_attention_max_distance"] = text.max_distance
    params = random_tree(umt5_shapes(text))
    write_encoder(out / "text_encoder", "model.safetensors", params, umt5.TRANSFORMERS, config)
    config = {
        "base_dim": autoencoder.dim,
        "dim_mult": autoencoder.dim_mult,
        "num_res_blocks": autoencoder.num_res_blocks,
        "temperal_downsample": autoencoder.temporal_downsample,
        "z_dim": autoencoder.z_dim,
        "latents_mean": autoencoder.latents_mean,
        "latents_std": autoencoder.latents_std,
    }
    params, layout = random_tree(vae_shapes(autoencoder)), vae.layouts(autoencoder)[1]
    write_encoder(out / "vae", "diffusion_pytorch_model.safetensors", params, layout, config)
    write_tokenizer(out / "tokenizer")


if __name__ == "__main__":
    app.run(main)
