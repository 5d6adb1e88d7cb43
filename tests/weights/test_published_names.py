"""The tables of layouts against names spelled out one by one, and a network of Diffusers."""

import chex
import pytest
from safetensors.numpy import load_file, save_file
from wan_names import from_diffusers, from_original, golden, original_tensors

from arl2_jax.config import ModelConfig
from arl2_jax.weights import export_params, load_params

FILE = "diffusion_pytorch_model.safetensors"
PLAIN = ModelConfig(
    dim=24, num_heads=2, ffn_dim=40, num_layers=3, freq_dim=8, text_dim=10, text_len=4, in_dim=3,
    out_dim=3, lora_rank=2,
)  # fmt: skip
HYBRID = ModelConfig(**vars(PLAIN) | dict(hybrid_layers=(0, 2)))


def diffusers():
    cfg, tensors, _ = golden("transformer")
    return cfg, tensors, from_diffusers(tensors, cfg)


def original(cfg):
    tensors = original_tensors(cfg)
    return cfg, tensors, from_original(tensors, cfg)


@pytest.mark.parametrize("layout", ["wan", "arl2", "diffusers"])
def test_both_ways(layout, tmp_path):
    cfg, tensors, params = {
        "wan": lambda: original(PLAIN),
        "arl2": lambda: original(HYBRID),
        "diffusers": diffusers,
    }[layout]()
    save_file(tensors, tmp_path / "published.safetensors")
    found = load_params(tmp_path / "published.safetensors", cfg)
    chex.assert_trees_all_equal(found, params)

    export_params(tmp_path / "ours", params, cfg, layout)
    prefix = "model." if layout == "arl2" else ""
    written = {n.removeprefix(prefix): x for n, x in load_file(tmp_path / "ours" / FILE).items()}
    chex.assert_trees_all_equal(written, tensors)
