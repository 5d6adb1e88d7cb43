"""Tensors read into parameters: axes, slices, types, and everything that a file can have wrong."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from one_line import assert_one_line
from safetensors.numpy import load_file, save_file

from arl2_jax.errors import WeightsError
from arl2_jax.weights import fingerprint
from arl2_jax.weights.axes import fit_axes
from arl2_jax.weights.layout import Layout, Rule
from arl2_jax.weights.read import read_tree, tree_tensors
from arl2_jax.weights.safetensors_file import ExportTensor, to_file_array, write_file, write_shards
from arl2_jax.weights.tensors import FileTensor, open_tensors

ROWS = 600  # more than two blocks of rows, and not a multiple of them
LAYOUT = Layout(
    "test",
    (
        Rule("as_is", "as_is"),
        Rule("turned", "turned", "o i -> i o"),
        Rule("patches", "patches", "o c t h w -> (t h w c) o"),
        Rule("heads", "heads", "(h o) i 1 -> h i o"),
        Rule("one", "one", "1 n c -> n c"),
        Rule("scalar", "scalar"),
        Rule("kernel", "kernel", "o i t h w -> t h w i o"),
    ),
    aliases={"tied": "as_is"},
)
SHAPES = {
    "as_is": (ROWS, 4), "turned": (ROWS, 8), "patches": (16, 3, 1, 2, 2), "heads": (12, 4, 1),
    "one": (1, 2, 8), "scalar": (), "kernel": (300, 5, 3, 1, 1),
}  # fmt: skip
EXPECTED = {
    "as_is": lambda x: x,
    "turned": np.transpose,
    "patches": lambda x: x.transpose(2, 3, 4, 1, 0).reshape(12, 16),
    "heads": lambda x: x.reshape(3, 4, 4).transpose(0, 2, 1),
    "one": lambda x: x[0],
    "scalar": lambda x: x,
    "kernel": lambda x: x.transpose(2, 3, 4, 1, 0),
}


def make(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(s), dtype) for name, s in SHAPES.items()}


def targets(dtype=np.float32):
    return {
        name: jax.ShapeDtypeStruct(EXPECTED[name](value).shape, dtype)
        for name, value in make().items()
    }


def tensors_in_memory(tensors, log=None):
    """Stored tensors that note the bytes of every reading."""

    def tensor(name, array):
        def read_slice(index):
            block = np.asarray(array[index])
            if log is not None:
                log.setdefault(name, []).append(block.nbytes)
            return block

        return FileTensor(array.shape, array.dtype, read_slice)

    return {name: tensor(name, array) for name, array in tensors.items()}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("source", [np.float64, np.float32, ml_dtypes.bfloat16, np.float16])
def test_axes_and_types(tmp_path, source, dtype):
    tensors = make(source)
    save_file(tensors, tmp_path / "model.safetensors")
    found = read_tree(open_tensors(tmp_path), [LAYOUT], targets(dtype), where=tmp_path)
    for name, value in found.items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, EXPECTED[name](tensors[name]).astype(dtype), name)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_inverse(dtype):
    tensors = make(dtype)
    read = read_tree(tensors_in_memory(tensors), [LAYOUT], targets(dtype), where="")
    for name, value in tree_tensors(read, LAYOUT).items():
        assert value.dtype == dtype and value.flags.c_contiguous
        np.testing.assert_array_equal(value, tensors[name], name)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
def test_our_files_are_those_of_the_library(tmp_path, dtype):
    """Read by the safetensors library, whole and in shards."""
    tensors = make(dtype)
    axes = {rule.source: rule.axes for rule in LAYOUT.rules}
    ours = [
        ExportTensor(n, EXPECTED[n](x), fit_axes(axes[n], None, EXPECTED[n](x).shape, LAYOUT.sizes))
        for n, x in tensors.items()
    ]
    write_file(tmp_path / "one.safetensors", ours)
    (tmp_path / "shards").mkdir()
    write_shards(tmp_path / "shards", ours, shard_size=10_000)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(files) > 2
    parts = [load_file(file) for file in files]
    for found in (
        load_file(tmp_path / "one.safetensors"),
        {n: x for p in parts for n, x in p.items()},
    ):
        assert found.keys() == tensors.keys()
        for name, value in found.items():
            assert value.dtype == dtype
            np.testing.assert_array_equal(value, tensors[name], name)
    for tensor in ours:
        np.testing.assert_array_equal(to_file_array(tensor), tensors[tensor.name])
    index = json.loads(
        (tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    assert open_tensors(tmp_path / "shards").keys() == tensors.keys()


def test_devices_read_their_slices_alone():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    specs = {
        "as_is": P("a", "b"), "turned": P("b", "a"), "patches": P("a", "b"), "heads": P(None, "a"),
        "one": P(None, "b"), "scalar": P(), "kernel": P(None, None, None, None, "a"),
    }  # fmt: skip
    places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    tensors, log = make(), {}
    found = read_tree(
        tensors_in_memory(tensors, log), [LAYOUT], targets(), where="", shardings=places
    )
    for name, value in found.items():
        assert value.sharding == places[name]
        np.testing.assert_array_equal(value, EXPECTED[name](tensors[name]), name)
    # The slices are all of it, each read once; also where two devices share one (kernel).
    for name in ("as_is", "turned", "one", "kernel", "scalar"):
        assert sum(log[name]) == tensors[name].nbytes, name
    assert log["turned"] == [tensors["turned"].nbytes // 8] * 8


@pytest.mark.parametrize(
    "index", [(slice(3, 7),), (slice(0, ROWS), slice(2, 3)), (), (slice(5, 5),)]
)
def test_slices_of_a_file(tmp_path, index):
    tensors = make(ml_dtypes.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    opened = open_tensors(tmp_path / "model.safetensors")["turned"]
    np.testing.assert_array_equal(opened.read(index), tensors["turned"][index])


def test_a_tied_tensor_counts_once():
    tensors = make()
    twice = tensors | {"tied": tensors["as_is"]}
    only = {name: x for name, x in twice.items() if name != "as_is"}
    for given in (twice, only):
        found = read_tree(tensors_in_memory(given), [LAYOUT], targets(), where="")
        np.testing.assert_array_equal(found["as_is"], tensors["as_is"])
    with pytest.raises(WeightsError, match="1 unexpected: tied"):
        other = tensors_in_memory(tensors | {"tied": np.zeros(3, np.float32)})
        read_tree(other, [LAYOUT], targets(), where="")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["turned", "heads", "scalar"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_nan_is_named(name, value, dtype):
    tensors = make()
    tensors[name].reshape(-1)[-1] = value
    with pytest.raises(WeightsError) as error:
        read_tree(tensors_in_memory(tensors), [LAYOUT], targets(dtype), where="file.pt")
    assert_one_line(error, "file.pt", name, "NaN or infinity")


@pytest.mark.parametrize("dtype", [np.int32, np.int8, np.bool_, ml_dtypes.float8_e4m3fn])
def test_a_wrong_type_is_named(tmp_path, dtype):
    tensors = make()
    tensors["turned"] = np.ones_like(tensors["turned"]).astype(dtype)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        read_tree(open_tensors(tmp_path), [LAYOUT], targets(), where=tmp_path)
    assert_one_line(error, tmp_path, "turned", np.dtype(dtype).name, "quantised")


def test_a_file_that_shrinks_while_it_is_read_is_one_line(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(make(), file)
    opened = open_tensors(file)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(WeightsError) as error:
        read_tree(
            {n: opened[n] for n in ("turned",)},
            [LAYOUT],
            {"turned": targets()["turned"]},
            where=file,
        )
    assert_one_line(error, file, "turned", "cannot be read")


def test_wrappers_are_stripped(tmp_path):
    tensors = make()
    wrapped = {
        "model._fsdp_wrapped_module.as_is": "as_is",
        "model.turned": "turned",
        "module.model.patches": "patches",
        "_orig_mod.heads": "heads",
        "model._fsdp_wrapped_module._checkpoint_wrapped_module.one": "one",
        "scalar": "scalar",
        "kernel": "kernel",
    }
    save_file({name: tensors[ours] for name, ours in wrapped.items()}, tmp_path / "x.safetensors")
    assert open_tensors(tmp_path).keys() == tensors.keys()


def test_two_names_of_one_tensor_are_one_line(tmp_path):
    save_file({"as_is": np.ones(3), "model.as_is": np.ones(3)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="1 unexpected: as_is is there twice") as error:
        open_tensors(tmp_path)
    assert_one_line(error, tmp_path)


def test_several_files_and_no_index_are_one_line(tmp_path):
    for name in ("a-00001-of-00002", "a-00002-of-00002"):
        save_file({name: np.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError) as error:
        open_tensors(tmp_path)
    assert_one_line(error, tmp_path, "a-00001-of-00002.safetensors", "index.json")


def test_an_entry_of_a_safetensors_file_is_one_line(tmp_path):
    save_file(make(), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="entry=generator") as error:
        open_tensors(tmp_path, "generator")
    assert_one_line(error, tmp_path / "model.safetensors")


def test_a_pt_without_torch_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "model.pt").write_bytes(b"PK")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(WeightsError) as error:
        open_tensors(tmp_path)
    assert_one_line(error, tmp_path / "model.pt", "pip install 'arl2-jax[pt]'", "-e '.[pt]'")


def test_fingerprints_tell_contents_apart(tmp_path):
    tensors = make()
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    save_file(tensors, tmp_path / "b" / "other.safetensors")
    tensors["turned"][300, 3] += 1
    save_file(tensors, tmp_path / "c" / "model.safetensors")
    a, b, c = (fingerprint(tmp_path / folder) for folder in ("a", "b", "c"))
    assert a == b != c and len(a) == 64
    assert fingerprint(tmp_path / "a" / "model.safetensors") == a
    with pytest.raises(WeightsError):
        fingerprint(tmp_path / "nowhere")
