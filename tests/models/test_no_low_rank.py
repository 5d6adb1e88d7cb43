"""A model without low-rank updates (`lora_rank=0`) is one whose updates are zero."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util
from safetensors.numpy import load_file, save_file

from arl2_jax import models
from arl2_jax.errors import ConfigError
from arl2_jax.models.hybrid_attention import HybridAttention
from arl2_jax.weights import export_params, load_params, model_config
from arl2_jax.weights.folder import save_params


@pytest.fixture(scope="module")
def plain(cfg):
    return dataclasses.replace(cfg, lora_rank=0)


@pytest.fixture(scope="module")
def plain_params(plain, make_params):
    return make_params(plain)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def with_zero_updates(plain_params, cfg):
    """The same parameters in a model that has updates, whose factor B is zero."""
    shapes = flat(models.param_shapes(cfg))
    given = flat(plain_params)
    zero = lambda path, x: jnp.full(x.shape, 0.0 if path.endswith("/b") else 0.5, x.dtype)
    tree = {path: given.get(path, zero(path, leaf)) for path, leaf in shapes.items()}
    return traverse_util.unflatten_dict(tree, sep="/")


def test_only_the_updates_are_absent(cfg, plain):
    there, here = (set(flat(models.param_shapes(c))) for c in (cfg, plain))
    assert here < there and {path for path in there if "/lora_" in path} == there - here
    assert set(flat(models.init_params(plain, jax.random.key(0)))) == here


@pytest.mark.parametrize("gate", ["learned", "local"])
def test_clip_form_is_block_form(
    plain, plain_params, clip, apply_clip, block_by_block, error, gate
):
    model = dataclasses.replace(plain, memory_gate=gate)
    flow, _ = apply_clip(plain_params, model, *clip)
    wanted, _ = block_by_block(plain_params, model, clip)
    assert error(flow, wanted) < 2e-5  # as in test_forms: float32 sums in another order


def test_values_and_gradients_are_those_of_zero_updates(cfg, plain, plain_params, clip, error):
    def loss(params, model):
        return jnp.mean(jnp.square(models.apply_clip(params, model, *clip)[0]))

    grad = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, found = grad(plain_params, plain)
    other, wanted = grad(with_zero_updates(plain_params, cfg), cfg)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    wanted = flat(wanted)
    for path, leaf in flat(found).items():
        assert np.isfinite(leaf).all(), path
        if "/delta/" in path:
            assert np.any(leaf), path
        # float32 sums in another order; some cancel nearly.
        assert error(leaf, wanted[path]) < 1e-3 or not np.any(wanted[path]), path


@pytest.mark.parametrize("layout", ["saved", "arl2", "merged"])
def test_weights_come_back(plain, plain_params, tmp_path, layout):
    if layout == "saved":
        save_params(tmp_path / "out", plain_params, dataclasses.asdict(plain))
    else:
        lora = "merged" if layout == "merged" else "apart"
        export_params(tmp_path / "out", plain_params, plain, lora=lora)
    assert model_config(tmp_path / "out") == plain
    read = flat(load_params(tmp_path / "out", plain))
    for path, leaf in flat(plain_params).items():
        np.testing.assert_array_equal(read[path], leaf, path)
    assert read.keys() == flat(plain_params).keys()


def test_a_file_without_updates_tells_it(cfg, params, plain, tmp_path):
    """Also where no config.json stands beside it."""
    export_params(tmp_path / "out", params, cfg)
    [file] = (tmp_path / "out").glob("*.safetensors")
    tensors = {name: x for name, x in load_file(file).items() if ".lora_" not in name}
    tensors = {name.replace(".linear.", "."): x for name, x in tensors.items()}
    save_file(tensors, tmp_path / "bare.safetensors")
    facts = ("num_heads", "text_len", "frames_per_block", "lora_alpha")
    given = {name: getattr(plain, name) for name in facts}
    found = model_config(tmp_path / "bare.safetensors", **given)
    assert found == plain
    read = flat(load_params(tmp_path / "bare.safetensors", found))
    assert read.keys() == flat(models.param_shapes(plain)).keys()
    for path, leaf in read.items():
        np.testing.assert_array_equal(leaf, flat(params)[path], path)


def test_a_layer_alone_has_none(plain):
    make = lambda rank: HybridAttention(plain.dim, 2, lora_rank=rank, rngs=nnx.Rngs(0))
    paths = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(make(0))))
    assert paths and not any("lora" in name for path in paths for name in map(str, path))
    with pytest.raises(ConfigError, match="lora_rank=-1 must not be negative"):
        make(-1)
