"""Wan2.1's original layout and our own folders, read into the same tree."""

import dataclasses
import json
import os

import chex
import jax
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util
from one_line import assert_one_line
from safetensors.numpy import save_file

from arl2_jax.config import MeshConfig, ModelConfig, to_config_dict
from arl2_jax.errors import WeightsError
from arl2_jax.models import compute_shapes, param_shapes
from arl2_jax.sharding import make_mesh, tree_shardings
from arl2_jax.weights import load_params
from arl2_jax.weights.folder import save_params

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
CFG = ModelConfig(
    dim=24,
    ffn_dim=40,
    num_heads=2,
    num_layers=3,
    freq_dim=8,
    text_dim=10,
    text_len=4,
    in_dim=3,
    out_dim=3,
    lora_rank=2,
)
HYBRID = ModelConfig(**to_config_dict(CFG) | {"hybrid_layers": (0, 2)})
NEIGHBOURS = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "text_embedding/fc1",
    "text_embedding.2": "text_embedding/fc2",
    "time_embedding.0": "time_embedding/fc1",
    "time_embedding.2": "time_embedding/fc2",
    "time_projection.1": "time_projection",
    "head.head": "head/linear",
}


def wan_tensors(seed=0, dtype=np.float32):
    """The tensors of a Wan2.1 model as its own code names and shapes them."""
    random = np.random.RandomState(seed)
    shapes = {"head.modulation": (1, 2, 24)}

    def linear(name, n_in, n_out):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)

    shapes["patch_embedding.weight"], shapes["patch_embedding.bias"] = (24, 3, 1, 2, 2), (24,)
    linear("text_embedding.0", 10, 24)
    linear("text_embedding.2", 24, 24)
    linear("time_embedding.0", 8, 24)
    linear("time_embedding.2", 24, 24)
    linear("time_projection.1", 24, 6 * 24)
    linear("head.head", 24, 2 * 2 * 3)
    for i in range(3):
        shapes[f"blocks.{i}.modulation"] = (1, 6, 24)
        shapes[f"blocks.{i}.norm3.weight"] = shapes[f"blocks.{i}.norm3.bias"] = (24,)
        linear(f"blocks.{i}.ffn.0", 24, 40)
        linear(f"blocks.{i}.ffn.2", 40, 24)
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linear(f"blocks.{i}.{attention}.{name}", 24, 24)
            for name in "qk":
                shapes[f"blocks.{i}.{attention}.norm_{name}.weight"] = (24,)
    return {name: random.randn(*shape).astype(dtype) for name, shape in shapes.items()}


def write_folder(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / SINGLE)
    facts = {"_class_name": "WanModel", "model_type": "t2v", "dim": 24, "num_heads": 2}
    (folder / "config.json").write_text(json.dumps(facts | (config or {})))
    return folder


def write_shards(folder, tensors):
    names, half = sorted(tensors), len(tensors) // 2
    parts = {
        "a-00001-of-00002.safetensors": names[:half],
        "a-2-of-2.safetensors": names[half:],
    }
    folder.mkdir()
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def flat(params):
    return traverse_util.flatten_dict(params, sep="/")


def assert_tree(params, cfg):
    shapes = flat(param_shapes(cfg))
    assert {n: (x.shape, x.dtype) for n, x in flat(params).items()} == {
        n: (x.shape, x.dtype) for n, x in shapes.items()
    }


def assert_is(params, tensors):
    """Every parameter holds the tensor of its name, the way round that `x @ kernel` needs."""
    assert_tree(params, CFG)
    found, used = flat(params), set()
    for path, value in found.items():
        if path.endswith("modulation"):
            name, expected = path.replace("/", "."), lambda x: x[0]
        elif path == "patch_embedding/kernel":
            # A patch's features are ordered (frames, rows, columns, channels).
            name, expected = (
                "patch_embedding.weight",
                lambda x: np.stack(
                    [x[:, c, 0, h, w] for h in range(2) for w in range(2) for c in range(3)]
                ),
            )
        else:
            node, leaf = path.rsplit("/", 1)
            node = {ours: theirs for theirs, ours in NEIGHBOURS.items()}.get(node, node)
            node = node.replace("ffn/fc1", "ffn.0").replace("ffn/fc2", "ffn.2").replace("/", ".")
            name = f"{node}.bias" if leaf == "bias" else f"{node}.weight"
            expected = np.transpose
        np.testing.assert_array_equal(value, expected(tensors[name]).astype(np.float32), path)
        used.add(name)
    assert used == set(tensors)


def test_a_single_file_with_and_without_its_folder(tmp_path):
    tensors = wan_tensors()
    folder = write_folder(tmp_path / "wan", tensors)
    assert_is(load_params(folder, CFG), tensors)
    os.rename(folder / SINGLE, tmp_path / "other.safetensors")
    assert_is(load_params(str(tmp_path / "other.safetensors"), CFG), tensors)


def test_shards(tmp_path):
    tensors = wan_tensors()
    assert_is(load_params(write_shards(tmp_path / "wan", tensors), CFG), tensors)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_becomes_the_type_of_the_model(tmp_path, dtype):
    tensors = wan_tensors(dtype=dtype)
    assert_is(load_params(write_folder(tmp_path, tensors), CFG), tensors)


def test_the_patch_kernel_is_the_convolution(tmp_path):
    tensors = wan_tensors()
    kernel = load_params(write_folder(tmp_path, tensors), CFG)["patch_embedding"]["kernel"]
    video = np.random.RandomState(1).randn(1, 2, 2, 3)  # frames, rows, columns, channels
    convolved = np.einsum("octhw,thwc->o", tensors["patch_embedding.weight"], video)
    np.testing.assert_allclose(video.reshape(-1) @ kernel, convolved, rtol=1e-5, atol=1e-6)


def test_hybrid_layers_are_initialised(tmp_path):
    folder = write_folder(tmp_path, wan_tensors())
    teacher, default = flat(load_params(folder, CFG)), load_params(folder, HYBRID)
    other = load_params(folder, HYBRID, jax.random.key(1))
    assert_tree(default, HYBRID)
    assert_tree(other, HYBRID)
    assert all(np.array_equal(flat(other)[path], value) for path, value in teacher.items())
    changed = {p for p, value in flat(other).items() if (value != flat(default)[p]).any()}
    assert changed and all("/delta/" in path for path in changed)


def saved(folder, cfg):
    random = np.random.RandomState(5)
    params = jax.tree.map(lambda x: random.randn(*x.shape).astype(x.dtype), param_shapes(cfg))
    save_params(folder, params, to_config_dict(cfg))
    return params


def test_saved_weights_come_back(tmp_path):
    params = saved(tmp_path / "hybrid", HYBRID)
    found = load_params(tmp_path / "hybrid", HYBRID)
    assert_tree(found, HYBRID)
    chex.assert_trees_all_equal(found, params)


def test_a_saved_teacher_starts_a_hybrid(tmp_path):
    params = saved(tmp_path / "teacher", CFG)
    found = load_params(tmp_path / "teacher", HYBRID)
    assert_tree(found, HYBRID)
    for path, value in flat(params).items():
        np.testing.assert_array_equal(flat(found)[path], value)


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"hybrid_layers": (0, 1)}, "hybrid_layers is [0, 2] there and [0, 1] here"),
        ({"hybrid_layers": ()}, "hybrid_layers is [0, 2] there and [] here"),
        ({"num_heads": 1}, "num_heads is 2 there and 1 here"),
        ({"lora_rank": 3}, "blocks/0/delta/lora_fc1/a is [24, 2] there and [24, 3] here"),
    ],
)
def test_saved_weights_of_another_model(tmp_path, changes, part):
    saved(tmp_path / "hybrid", HYBRID)
    with pytest.raises(WeightsError) as error:
        load_params(tmp_path / "hybrid", ModelConfig(**to_config_dict(HYBRID) | changes))
    assert_one_line(error, tmp_path / "hybrid", part)


def test_config_json_of_another_model(tmp_path):
    folder = write_folder(tmp_path, wan_tensors(), {"num_heads": 4, "eps": 1e-5})
    with pytest.raises(WeightsError) as error:
        load_params(folder, CFG)
    assert_one_line(error, folder, "eps is 1e-05", "num_heads is 4 there and 2 here")


def test_all_wrong_names_are_listed_together(tmp_path):
    tensors = wan_tensors()
    del tensors["blocks.1.ffn.0.bias"], tensors["head.modulation"]
    tensors["img_emb.proj.weight"] = np.zeros(3, np.float32)
    tensors["blocks.3.norm3.bias"] = np.zeros(24, np.float32)
    tensors["blocks.0.norm3.bias"] = np.zeros(25, np.float32)
    tensors["patch_embedding.weight"] = np.zeros((24, 12), np.float32)
    with pytest.raises(WeightsError) as error:
        load_params(write_folder(tmp_path, tensors), CFG)
    assert_one_line(
        error,
        tmp_path,
        "2 missing: blocks/1/ffn/fc1/bias, head/modulation;",
        "2 unexpected: blocks.3.norm3.bias, img_emb.proj.weight;",
        "2 of another shape: blocks.0.norm3.bias [25] (for blocks/0/norm3/bias [24]), patch_embed",
    )


def test_a_tensor_in_two_shards_is_unexpected(tmp_path):
    folder = write_shards(tmp_path / "wan", wan_tensors())
    save_file({"head.head.bias": np.zeros(12, np.float32)}, folder / "third.safetensors")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["extra"] = "third.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(WeightsError, match=r"1 unexpected: head\.head\.bias"):
        load_params(folder, CFG)


def test_missing_files_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.bin").write_bytes(b"")
    shards = write_shards(tmp_path / "wan", wan_tensors())
    (shards / "a-2-of-2.safetensors").unlink()
    expected = {
        "nowhere": (tmp_path / "nowhere", "does not exist", "name another"),
        "empty": (tmp_path / "empty", SINGLE, "index.json", "name another"),
        "model.bin": ("not a .safetensors, .pt or .pth file",),
        "wan": (shards / "a-2-of-2.safetensors is missing", "download"),
    }
    for name, parts in expected.items():
        with pytest.raises(WeightsError) as error:
            load_params(tmp_path / name, CFG)
        assert_one_line(error, *parts)


@pytest.mark.parametrize("length", [0, 5, 200, -3])
def test_a_file_that_was_cut_off_is_one_line(tmp_path, length):
    file = write_folder(tmp_path, wan_tensors()) / SINGLE
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(WeightsError, match="cannot be read") as error:
        load_params(tmp_path, CFG)
    assert_one_line(error, file, "download it again")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_a_damaged_json_file_is_one_line(tmp_path, name):
    folder = write_shards(tmp_path / "wan", wan_tensors())
    (folder / name).write_text('{"weight_map": {')
    with pytest.raises(WeightsError, match="cannot be read") as error:
        load_params(folder, CFG)
    assert_one_line(error, folder / name)


@pytest.mark.parametrize("saved_by_us", [True, False], ids=["ours", "original"])
@pytest.mark.parametrize("precision", ["master", "compute"])
def test_every_device_gets_its_slice(tmp_path, saved_by_us, precision):
    """Also of what is initialised, and in the types of the compute copy."""
    cfg = dataclasses.replace(HYBRID, dtype="bfloat16")
    if saved_by_us:
        saved(tmp_path / "weights", HYBRID)
    else:
        write_folder(tmp_path / "weights", wan_tensors())
    whole = load_params(tmp_path / "weights", cfg, precision=precision)
    shapes = param_shapes(cfg) if precision == "master" else compute_shapes(cfg)
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    places = tree_shardings(shapes, mesh)
    found = load_params(tmp_path / "weights", cfg, precision=precision, shardings=places)
    for path, leaf in flat(found).items():
        assert leaf.sharding == flat(places)[path] and leaf.dtype == flat(shapes)[path].dtype
        np.testing.assert_array_equal(leaf, flat(whole)[path], path)
    kernel = found["blocks"]["0"]["ffn"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (24 // 4, 40 // 2)
