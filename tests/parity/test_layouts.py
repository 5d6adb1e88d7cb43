"""Files that others write are read, and others read the files that we write: bit for bit."""

import functools

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from one_line import assert_one_line
from parity.wan import (
    channels_first,
    channels_last,
    per_token,
    random_inputs,
    random_wan,
    tensors_of,
)
from safetensors.numpy import load_file
from wan_names import from_diffusers, from_original, original_tensors

from arl2_jax import models
from arl2_jax.config import ModelConfig
from arl2_jax.errors import WeightsError
from arl2_jax.weights import export_params, load_params, model_config

pytestmark = pytest.mark.parity

SIZES = dict(
    dim=24, num_heads=2, ffn_dim=40, num_layers=3, freq_dim=8, text_dim=10, text_len=4, in_dim=3,
    out_dim=3, frames_per_block=2, lora_rank=2,
)  # fmt: skip
WAN = ModelConfig(**SIZES)
PATCHES = ModelConfig(**SIZES | dict(patch_size=(1, 1, 3), out_dim=5))
HYBRID = ModelConfig(**SIZES | dict(hybrid_layers=(0, 2)))
ONE_FILE = "diffusion_pytorch_model.safetensors"


def assert_same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def assert_same_flow(network, params, cfg, apply, error):
    latents, timestep, text = random_inputs(cfg, frames=2, rows=3, columns=1)
    memory = models.init_memory(cfg, batch=2, frames=2, tokens_per_frame=3)
    found, _ = apply(params, cfg, latents, timestep, text, memory=memory)
    inputs = channels_first(latents), per_token(timestep, 3), torch.tensor(np.asarray(text))
    assert error(found, channels_last(network(*inputs).sample)) < 1e-5


@pytest.mark.parametrize("cfg", [WAN, PATCHES], ids=["wan", "patches"])
@pytest.mark.parametrize("shard", ["10GB", "15kB"])
def test_a_folder_of_diffusers_is_read(cfg, shard, tmp_path):
    network = random_wan(cfg)
    network.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / ONE_FILE).exists() == (shard == "10GB")
    # Diffusers does not know what its network is asked for.
    asked = dict(text_len=4, frames_per_block=2, lora_rank=2)
    assert model_config(tmp_path, **asked) == cfg
    assert_same(load_params(tmp_path, cfg), from_diffusers(tensors_of(network), cfg))


def test_a_folder_of_diffusers_in_bfloat16_is_read(tmp_path):
    network = random_wan(WAN).to(torch.bfloat16)
    network.save_pretrained(tmp_path)
    assert_same(load_params(tmp_path, WAN), from_diffusers(tensors_of(network.float()), WAN))


@pytest.mark.parametrize("cfg", [WAN, PATCHES], ids=["wan", "patches"])
@pytest.mark.parametrize("shard", [5e9, 15e3])
def test_diffusers_opens_our_folder(cfg, shard, tmp_path, apply, error):
    params = from_original(original_tensors(cfg), cfg)
    export_params(tmp_path / "ours", params, cfg, "diffusers", shard_size=shard)
    network, report = WanTransformer3DModel.from_pretrained(
        tmp_path / "ours", local_files_only=True, output_loading_info=True
    )
    assert not any(report.values()), report
    assert_same(from_diffusers(tensors_of(network), cfg), params)
    assert_same_flow(network, params, cfg, apply, error)


@pytest.mark.parametrize("cfg", [WAN, PATCHES], ids=["wan", "patches"])
def test_diffusers_converts_our_original_names(cfg, tmp_path, apply, error):
    tensors = original_tensors(cfg)
    params = from_original(tensors, cfg)
    export_params(tmp_path / "ours", params, cfg, "wan")
    written = load_file(tmp_path / "ours" / ONE_FILE)
    assert written.keys() == tensors.keys()
    assert_same(written, tensors)
    network = random_wan(cfg, seed=1)
    renamed = convert_wan_transformer_to_diffusers(written)
    network.load_state_dict({n: torch.tensor(x) for n, x in renamed.items()}, strict=True)
    assert_same_flow(network, params, cfg, apply, error)


def wrapped(name):
    """A name as training with sharded parameters and rematerialised blocks leaves it."""
    first, *rest = name.split(".")
    if first == "blocks":
        layer, *rest = rest
        rest = [layer, "_fsdp_wrapped_module", "_checkpoint_wrapped_module", *rest]
    return ".".join(["model", "_fsdp_wrapped_module", first, *rest])


def parameters(tensors, change=lambda x: x, rename=lambda name: f"model.{name}"):
    return {rename(name): change(torch.tensor(x)) for name, x in tensors.items()}


def contents(tensors, others):
    """What a .pt may hold, of which `tensors` are meant."""
    model, other = parameters(tensors), parameters(others)
    old = functools.partial(torch.save, _use_new_zipfile_serialization=False)
    across = lambda x: x.mT.contiguous().mT if x.ndim > 1 else x
    return {
        "generator": ({"generator": model}, torch.save),
        "generator_ema": ({"generator_ema": model}, torch.save),
        "both": ({"generator": other, "generator_ema": model, "step": 7}, torch.save),
        "bare": (parameters(tensors, rename=str), torch.save),
        "wrapped": ({"generator": parameters(tensors, rename=wrapped)}, torch.save),
        "old": ({"generator": model}, old),
        "parameters": ({"generator": parameters(tensors, torch.nn.Parameter)}, torch.save),
        "across": ({"generator": parameters(tensors, across)}, torch.save),
    }


@pytest.mark.parametrize("cfg", [WAN, HYBRID], ids=["wan", "hybrid"])
@pytest.mark.parametrize("kind", contents({}, {}))
def test_a_pt_is_read(cfg, kind, tmp_path):
    tensors = original_tensors(cfg)
    content, save = contents(tensors, original_tensors(cfg, seed=1))[kind]
    save(content, tmp_path / "model.pt")
    facts = dict(num_heads=2, text_len=4, frames_per_block=2)
    assert model_config(tmp_path / "model.pt", **facts, lora_rank=2) == cfg
    assert_same(load_params(tmp_path / "model.pt", cfg), from_original(tensors, cfg))


def test_either_model_of_a_pt_is_read(tmp_path):
    ema, plain = original_tensors(HYBRID), original_tensors(HYBRID, seed=1)
    content, _ = contents(ema, plain)["both"]
    torch.save(content, tmp_path / "model.pt")
    for entry, wanted in {"generator": plain, "generator_ema": ema, None: ema}.items():
        found = load_params(tmp_path / "model.pt", HYBRID, entry=entry)
        assert_same(found, from_original(wanted, HYBRID))


def test_a_pt_in_bfloat16_is_read(tmp_path):
    tensors = original_tensors(HYBRID)
    content = {"generator": parameters(tensors, lambda x: x.to(torch.bfloat16))}
    torch.save(content, tmp_path / "model.pt")
    rounded = {n: x.astype(ml_dtypes.bfloat16).astype(np.float32) for n, x in tensors.items()}
    found = load_params(tmp_path / "model.pt", HYBRID)
    assert_same(found, from_original(rounded, HYBRID))


class Code:
    """An object whose unpickling writes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return exec, (f"open({str(self.file)!r}, 'w').close()",)


@pytest.mark.parametrize("place", ["alone", "beside", "within"])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pt_is_not_run(place, zipped, tmp_path):
    code, model = Code(tmp_path / "written"), parameters(original_tensors(WAN))
    content = {
        "alone": code,
        "beside": {"generator": model, "args": code},
        "within": {"generator": model | {"model.patch_embedding.bias": code}},
    }[place]
    file = tmp_path / "model.pt"
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    for read in (model_config, functools.partial(load_params, cfg=WAN)):
        with pytest.raises(WeightsError) as error:
            read(file)
        assert_one_line(error, file, "code in it was not run")
    assert not (tmp_path / "written").exists()
    torch.load(file, weights_only=False)  # the file would have done it
    assert (tmp_path / "written").exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.999])
def test_a_pt_that_was_cut_off(share, zipped, tmp_path):
    file = tmp_path / "model.pt"
    model = {"generator": parameters(original_tensors(WAN))}
    torch.save(model, file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(WeightsError) as error:
        load_params(file, WAN)
    assert_one_line(error, file, "cannot be read", "download it again")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_numbers_that_are_none(value, dtype, tmp_path):
    tensors = original_tensors(HYBRID)
    tensors["blocks.2.self_attn.phi_v.weight"][5, 3] = value
    file = tmp_path / "model.pt"
    torch.save({"generator": parameters(tensors, lambda x: x.to(dtype))}, file)
    with pytest.raises(WeightsError) as error:
        load_params(file, HYBRID)
    assert_one_line(error, file, "blocks.2.self_attn.phi_v.weight", "NaN")
