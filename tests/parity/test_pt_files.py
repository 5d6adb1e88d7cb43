"""PyTorch's own files: every nesting and wrapper, old and new form, and those that hold code."""

import os

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from one_line import assert_one_line
from safetensors.numpy import save_file
from wan_names import original_tensors

from arl2_jax.config import ModelConfig, UMT5Config
from arl2_jax.errors import WeightsError
from arl2_jax.models.umt5 import umt5_shapes
from arl2_jax.weights import (
    find_release,
    fingerprint,
    load_params,
    load_text_encoder,
    model_config,
    umt5_config,
)
from arl2_jax.weights.layouts import umt5
from arl2_jax.weights.read import tree_tensors
from arl2_jax.weights.tensors import open_tensors

CFG = ModelConfig(
    dim=32, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_len=4, in_dim=4,
    out_dim=4, hybrid_layers=(1,), lora_rank=4,
)  # fmt: skip
WRAPPERS = {
    "bare": lambda name: name,
    "model": lambda name: f"model.{name}",
    "fsdp": lambda name: "model._fsdp_wrapped_module." + name.replace(
        "blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
    "module": lambda name: f"module.{name}",
}  # fmt: skip


def as_torch(tensors, wrap=lambda name: name):
    return {wrap(name): torch.from_numpy(x.copy()) for name, x in tensors.items()}


def assert_loads(file, expected, **choice):
    found = load_params(file, CFG, **choice)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def tensors():
    return original_tensors(CFG)


@pytest.fixture(scope="module")
def expected(tensors, tmp_path_factory):
    """The same weights from safetensors."""
    file = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_file(tensors, file)
    return load_params(file, CFG)


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_wrappers_and_forms(tmp_path, tensors, expected, wrap, zipped):
    content = {"generator": as_torch(tensors, WRAPPERS[wrap]), "step": 12}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    assert_loads(tmp_path / "m.pt", expected)
    assert_loads(tmp_path, expected)


@pytest.mark.parametrize("key", [None, "state_dict", "model", "ema", "anything"])
def test_nesting(tmp_path, tensors, expected, key):
    content = as_torch(tensors)
    torch.save(content if key is None else {key: content, "epoch": 3}, tmp_path / "m.pth")
    assert_loads(tmp_path / "m.pth", expected)


def test_entries(tmp_path, tensors, expected):
    other = {name: x + 1 for name, x in tensors.items()}
    content = {
        "generator": as_torch(other),
        "critic": {"x": torch.zeros(2)},
        "generator_ema": as_torch(tensors),
    }
    torch.save(content, tmp_path / "m.pt")
    assert_loads(tmp_path / "m.pt", expected)
    assert_loads(tmp_path / "m.pt", expected, entry="generator_ema")
    raw = load_params(tmp_path / "m.pt", CFG, entry="generator")
    np.testing.assert_array_equal(raw["head"]["modulation"], other["head.modulation"][0])
    with pytest.raises(WeightsError) as error:
        load_params(tmp_path / "m.pt", CFG, entry="ema")
    assert_one_line(error, "entry=ema", "generator, critic, generator_ema")


def test_the_model_of_a_file(tmp_path, tensors):
    torch.save({"generator": as_torch(tensors, WRAPPERS["model"])}, tmp_path / "m.pt")
    assert model_config(tmp_path / "m.pt", text_len=4, num_heads=2) == CFG
    assert find_release(tmp_path).transformer == tmp_path
    renamed = tmp_path / "other.pt"
    os.rename(tmp_path / "m.pt", renamed)
    assert fingerprint(renamed) == fingerprint(tmp_path)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int32]
)
def test_types(tmp_path, dtype):
    value = torch.tensor([[1.5, -2.25, 0.1], [3.0, 4.0, 5.0]]).to(dtype)
    torch.save({"x": value, "part": value[:, 1:], "turned": value.T}, tmp_path / "m.pt")
    opened = open_tensors(tmp_path / "m.pt")
    wanted = value.to(torch.float64).numpy()
    numpy_name = str(dtype).removeprefix("torch.")
    assert opened["x"].dtype == np.dtype(getattr(ml_dtypes, numpy_name, numpy_name))
    np.testing.assert_array_equal(opened["x"].read().astype(np.float64), wanted)
    np.testing.assert_array_equal(opened["part"].read().astype(np.float64), wanted[:, 1:])
    np.testing.assert_array_equal(opened["turned"].read().astype(np.float64), wanted.T)


def test_a_text_encoder(tmp_path):
    cfg = UMT5Config.tiny(dtype="bfloat16")
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(ml_dtypes.bfloat16).astype(x.dtype),
        umt5_shapes(cfg),
    )
    content = {
        name: torch.from_numpy(np.asarray(x, np.float32)).to(torch.bfloat16)
        for name, x in tree_tensors(params, umt5.WAN).items()
    }
    torch.save(content, tmp_path / "models_t5_tiny.pth")
    path = find_release(tmp_path).text_encoder
    assert umt5_config(path, text_len=8, max_distance=16) == cfg
    jax.tree.map(np.testing.assert_array_equal, load_text_encoder(path, cfg), params)


class Code:
    """Unpickled, it would make a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_code_is_not_run(tmp_path, tensors, zipped):
    content = as_torch(tensors) | {"x": Code(tmp_path / "harm")}
    torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError) as error:
        load_params(tmp_path / "m.pt", CFG)
    assert_one_line(error, tmp_path / "m.pt", "was not run")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("length", [0, 5, 300, -200])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_a_file_that_was_cut_off_is_one_line(tmp_path, tensors, length, zipped):
    file = tmp_path / "m.pt"
    torch.save(as_torch(tensors), file, _use_new_zipfile_serialization=zipped)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(WeightsError, match="cannot be read") as error:
        load_params(file, CFG)
    assert_one_line(error, file, "download it again")


def test_something_else_is_one_line(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save({"x": torch.zeros(2), "y": "text"}, tmp_path / "text.pt")
    for name, part in (("list", "list"), ("text", "y is of type str")):
        with pytest.raises(WeightsError) as error:
            open_tensors(tmp_path / f"{name}.pt")
        assert_one_line(error, part)
