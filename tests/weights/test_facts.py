"""What weights tell of their model, and where the parts of a release lie."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from one_line import assert_one_line
from safetensors.numpy import save_file
from wan_names import original_tensors

from arl2_jax.config import ModelConfig, UMT5Config, VAEConfig, to_config_dict
from arl2_jax.errors import WeightsError
from arl2_jax.models import init_params
from arl2_jax.models.umt5 import umt5_shapes
from arl2_jax.models.vae import vae_shapes
from arl2_jax.weights import (
    find_release,
    load_params,
    load_text_encoder,
    load_vae,
    model_config,
    umt5_config,
    vae_config,
)
from arl2_jax.weights.folder import save_params
from arl2_jax.weights.layouts import umt5, vae
from arl2_jax.weights.read import tree_tensors

CFG = ModelConfig(
    dim=256, ffn_dim=24, num_heads=2, num_layers=2, freq_dim=8, text_dim=10, in_dim=3, out_dim=5,
    hybrid_layers=(1,), lora_rank=3,
)  # fmt: skip
TEXT, VAE = UMT5Config.tiny(), VAEConfig.tiny()


def write(file, tensors, **config):
    file.parent.mkdir(exist_ok=True, parents=True)
    save_file(tensors, file)
    if config:
        (file.parent / "config.json").write_text(json.dumps(config))
    return file.parent


def random_tree(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(rng.standard_normal(x.shape), x.dtype), shapes)


def test_a_model_from_shapes_alone(tmp_path):
    folder = write(tmp_path / "model.safetensors", original_tensors(CFG))
    assert model_config(folder) == CFG
    assert model_config(folder, frames_per_block=1, dtype="bfloat16") == dataclasses.replace(
        CFG, frames_per_block=1, dtype="bfloat16"
    )
    teacher = write(tmp_path / "teacher" / "model.safetensors", original_tensors(CFG.teacher()))
    # Without memory nothing tells the rank.
    expected = dataclasses.replace(CFG.teacher(), lora_rank=16)
    assert model_config(teacher / "model.safetensors") == expected
    assert model_config(teacher, hybrid_layers=(0,)).hybrid_layers == (0,)


def test_config_json_tells_the_rest(tmp_path):
    stated = {"text_len": 77, "eps": 1e-5, "lora_alpha": 6.0, "_class_name": "WanModel"}
    folder = write(tmp_path / "model.safetensors", original_tensors(CFG), **stated)
    found = model_config(folder / "model.safetensors")
    assert (found.text_len, found.eps, found.lora_alpha) == (77, 1e-5, 6.0)


def test_config_json_of_another_model_is_one_line(tmp_path):
    folder = write(tmp_path / "model.safetensors", original_tensors(CFG), dim=128, num_layers=3)
    with pytest.raises(WeightsError) as error:
        model_config(folder)
    assert_one_line(
        error, folder, "dim is 128 in config.json and 256 in the file", "num_layers is 3"
    )


def test_another_scale_of_the_low_rank_updates_is_one_line(tmp_path):
    folder = write(tmp_path / "model.safetensors", original_tensors(CFG), lora_alpha=6.0)
    with pytest.raises(WeightsError) as error:
        load_params(folder, CFG)
    assert_one_line(error, folder, "lora_alpha is 6.0 there and 32.0 here")


def test_a_number_of_heads_that_nothing_tells_is_one_line(tmp_path, cfg):
    folder = write(tmp_path / "model.safetensors", original_tensors(cfg.teacher()))
    with pytest.raises(WeightsError) as error:
        model_config(folder)
    assert_one_line(error, folder, "num_heads", "dim=32")
    assert model_config(folder, num_heads=2).num_heads == 2


def test_a_folder_of_ours_tells_everything(tmp_path, cfg, params):
    save_params(tmp_path / "ours", params, to_config_dict(cfg))
    assert model_config(tmp_path / "ours") == cfg


@pytest.mark.parametrize("layout", umt5.LAYOUTS, ids=lambda layout: layout.name)
def test_the_text_encoder(tmp_path, layout):
    params = random_tree(umt5_shapes(TEXT))
    folder = write(
        tmp_path / "model.safetensors",
        tree_tensors(params, layout),
        relative_attention_max_distance=TEXT.max_distance, d_model=TEXT.dim, d_kv=TEXT.head_dim,
    )  # fmt: skip
    found = umt5_config(folder, text_len=TEXT.text_len, dtype="float32")
    assert found == TEXT
    chex.assert_trees_all_equal(load_text_encoder(folder, found), params, strict=True)
    half = dataclasses.replace(found, dtype="bfloat16")
    wanted = jax.tree.map(lambda x, s: x.astype(s.dtype), params, umt5_shapes(half))
    chex.assert_trees_all_equal(load_text_encoder(folder, half), wanted, strict=True)
    with pytest.raises(WeightsError, match="missing"):
        load_text_encoder(folder, dataclasses.replace(found, num_layers=3))


@pytest.mark.parametrize("number", [0, 1])
def test_the_vae(tmp_path, number):
    layout, params = vae.layouts(VAE)[number], random_tree(vae_shapes(VAE))
    folder = write(
        tmp_path / "model.safetensors",
        tree_tensors(params, layout),
        base_dim=VAE.dim, dim_mult=VAE.dim_mult, num_res_blocks=1, z_dim=VAE.z_dim,
        temperal_downsample=VAE.temporal_downsample, latents_mean=VAE.latents_mean,
        latents_std=VAE.latents_std,
    )  # fmt: skip
    assert vae_config(folder, dtype="float32") == VAE
    chex.assert_trees_all_equal(load_vae(folder, VAE), params, strict=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_dim": 16}))
    with pytest.raises(WeightsError) as error:
        vae_config(folder)
    assert_one_line(error, folder, "dim is 16 in config.json and 8 in the file")


def test_the_encoders_are_not_taken_for_transformers(tmp_path):
    folder = write(
        tmp_path / "model.safetensors", tree_tensors(random_tree(umt5_shapes(TEXT)), umt5.WAN)
    )
    with pytest.raises(WeightsError):
        load_params(folder, CFG)
    with pytest.raises(WeightsError):
        model_config(folder)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def test_the_original_release(tmp_path):
    root = touch(
        tmp_path, "config.json", "diffusion_pytorch_model.safetensors", "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json", "assets/logo.png",
    )  # fmt: skip
    assert find_release(root) == (
        root,
        root / "models_t5_umt5-xxl-enc-bf16.pth",
        root / "google/umt5-xxl/tokenizer.json",
        root / "Wan2.1_VAE.pth",
    )


def test_a_pipeline_of_diffusers(tmp_path):
    root = touch(
        tmp_path, "model_index.json", "transformer/config.json", "text_encoder/config.json",
        "tokenizer/tokenizer.json", "vae/config.json",
    )  # fmt: skip
    parts = ("transformer", "text_encoder", "tokenizer/tokenizer.json", "vae")
    assert find_release(root) == tuple(root / part for part in parts)


def test_the_folder_of_a_release_names_its_transformer(tmp_path):
    tensors = original_tensors(CFG.teacher())
    write(tmp_path / "transformer" / "model.safetensors", tensors)
    assert model_config(tmp_path).dim == CFG.dim
    loaded = load_params(tmp_path, CFG.teacher())
    np.testing.assert_array_equal(loaded["head"]["modulation"], tensors["head.modulation"][0])


def test_a_transformer_alone(tmp_path):
    nothing = (None, None, None)
    for name in ("model.pt", "a-1-of-2.safetensors", "params/d"):
        root = touch(tmp_path / name.replace("/", "_"), name)
        assert find_release(root) == (root, *nothing)
    file = tmp_path / "model.pt" / "model.pt"
    assert find_release(file) == (file, *nothing)
    assert find_release(tmp_path / "nowhere") == (None, *nothing)
    assert find_release(Path(__file__).parent) == (None, *nothing)


def test_additions_are_those_of_a_fresh_model(tmp_path):
    """A plain checkpoint in a hybrid: ARL2's published initialisation, the same on every path."""
    folder = write(tmp_path / "model.safetensors", original_tensors(CFG.teacher()))
    key = jax.random.key(4)
    fresh = init_params(CFG, key)["blocks"]["1"]["delta"]
    loaded = load_params(folder, CFG, key)["blocks"]["1"]["delta"]
    chex.assert_trees_all_equal(loaded, jax.device_get(fresh), strict=True)
    half = load_params(
        folder, dataclasses.replace(CFG, dtype="bfloat16"), key, precision="compute"
    )["blocks"]["1"]
    assert half["delta"]["A_log"].dtype == np.float32
    assert half["delta"]["phi_q"].dtype == half["ffn"]["fc1"]["kernel"].dtype == "bfloat16"
