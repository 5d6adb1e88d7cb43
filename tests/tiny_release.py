"""A release of Wan2.1 in small: transformer, text encoder, tokenizer and VAE, all random."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from arl2_jax.config import ModelConfig, UMT5Config, VAEConfig
from arl2_jax.models import param_shapes
from arl2_jax.models.umt5 import umt5_shapes
from arl2_jax.models.vae import vae_shapes
from arl2_jax.weights.layouts import umt5, vae
from arl2_jax.weights.layouts.wan import WAN
from arl2_jax.weights.read import tree_tensors

WORDS = (
    "a the one two sprite sprites red blue corgi on navy background bikes carphone big buck bunny"
)
MODEL = ModelConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=2, freq_dim=8, text_dim=32, text_len=8, in_dim=4,
    out_dim=4, frames_per_block=1, lora_rank=2,
)  # fmt: skip
TEXT, VAE = UMT5Config.tiny(), VAEConfig.tiny()


def random_tree(shapes: Any, seed: int = 0) -> Any:
    """Random numbers that keep activations of about 1."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = path[-1].key, rng.standard_normal(leaf.shape)
        fan_in = max(np.prod(leaf.shape[:-1]), 1) if leaf.ndim > 1 else 1
        value = 1 + 0.1 * noise if name in ("scale", "gamma") else noise * fan_in**-0.5
        return np.asarray(0.1 * noise if name == "bias" else value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, with the special tokens of T5."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    vocabulary |= {word: i for i, word in enumerate(WORDS.split(), start=3)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_release(folder: Path, cfg: ModelConfig = MODEL, seed: int = 0) -> Path:
    """Writes a Diffusers pipeline folder, with the transformer under the names of Wan."""
    write_tokenizer(folder / "tokenizer")
    parts = {
        "transformer": tree_tensors(random_tree(param_shapes(cfg), seed), WAN),
        "text_encoder": tree_tensors(random_tree(umt5_shapes(TEXT), seed + 1), umt5.TRANSFORMERS),
        "vae": tree_tensors(random_tree(vae_shapes(VAE), seed + 2), vae.layouts(VAE)[1]),
    }
    for name, tensors in parts.items():
        (folder / name).mkdir()
        file = "model" if name == "text_encoder" else "diffusion_pytorch_model"
        save_file(tensors, folder / name / f"{file}.safetensors")
    (folder / "transformer" / "config.json").write_text(json.dumps({"num_heads": 2, "text_len": 8}))
    (folder / "text_encoder" / "config.json").write_text(
        json.dumps({"num_heads": 4, "d_kv": 8, "relative_attention_max_distance": 16})
    )
    stated = {
        "base_dim": VAE.dim, "dim_mult": VAE.dim_mult, "num_res_blocks": VAE.num_res_blocks,
        "temperal_downsample": VAE.temporal_downsample, "z_dim": VAE.z_dim,
        "latents_mean": VAE.latents_mean, "latents_std": VAE.latents_std,
    }  # fmt: skip
    (folder / "vae" / "config.json").write_text(json.dumps(stated))
    return folder
