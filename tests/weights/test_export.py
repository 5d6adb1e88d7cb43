"""Parameters in the layouts of other programs, and back."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from one_line import assert_one_line
from safetensors.numpy import load_file, save_file
from wan_names import from_diffusers, from_original, original_kinds, original_tensors

from arl2_jax.config import GatedDeltaConfig
from arl2_jax.errors import ConfigError, StorageError, WeightsError
from arl2_jax.models import cast_params, without_delta
from arl2_jax.weights import export_params, load_params, model_config, safetensors_file
from arl2_jax.weights.transfer import export_weights, import_weights

SINGLE = "diffusion_pytorch_model.safetensors"


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_size", [5e9, 20_000], ids=["single", "shards"])
def test_a_converted_model_comes_back(tmp_path, cfg, params, dtype, shard_size):
    cfg = dataclasses.replace(cfg, dtype=dtype)
    params = cast_params(params, cfg)
    export_params(tmp_path / "out", params, cfg, shard_size=shard_size)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert ((tmp_path / "out" / SINGLE).exists()) == (shard_size == 5e9)
    assert model_config(tmp_path / "out", dtype=dtype) == cfg
    chex.assert_trees_all_equal(
        load_params(tmp_path / "out", cfg, precision="compute"), params, strict=True
    )


def test_the_names_are_those_of_the_published_file(tmp_path, cfg, params):
    """`model.` in front, as in the generator of a .pt; shapes and orientation as it has them."""
    export_params(tmp_path / "out", params, cfg)
    tensors = load_file(tmp_path / "out" / SINGLE)
    kinds = original_kinds(cfg)
    assert {name: x.shape for name, x in tensors.items()} == {
        f"model.{name}": tuple(shape) for name, (shape, *_) in kinds.items()
    }
    bare = {name.removeprefix("model."): x for name, x in tensors.items()}
    chex.assert_trees_all_equal(from_original(bare, cfg), params, strict=True)


def test_what_published_files_cannot_hold_is_refused_or_written(tmp_path, cfg, make_params):
    """A bias of the strength and another rule; both come back where they were asked for."""
    delta = GatedDeltaConfig(block_tokens=12, beta_max=1.0)
    cfg = dataclasses.replace(cfg, memory_init="by_block", delta=delta)
    params = make_params(cfg)
    with pytest.raises(WeightsError, match=r"delta\.beta_max=1\.0.*extras=write") as error:
        export_params(tmp_path / "out", params, cfg)
    assert_one_line(error, "bias of the strength", "memory_init=by_block")
    assert not (tmp_path / "out").exists()
    export_params(tmp_path / "out", params, cfg, extras="write")
    names = load_file(tmp_path / "out" / SINGLE)
    assert "model.blocks.0.self_attn.b_proj.bias" in names
    assert model_config(tmp_path / "out") == cfg
    chex.assert_trees_all_equal(load_params(tmp_path / "out", cfg), params, strict=True)
    published = dataclasses.replace(cfg, delta=dataclasses.replace(delta, beta_max=2.0))
    with pytest.raises(WeightsError, match=r"another model: beta_max"):
        load_params(tmp_path / "out", published)
    leaking = dataclasses.replace(cfg, delta=dataclasses.replace(delta, leak=0.1))
    # It may be chosen for any weights.
    chex.assert_trees_all_equal(load_params(tmp_path / "out", leaking), params, strict=True)
    with pytest.raises(WeightsError, match=r"delta\.leak=0\.1"):
        export_params(tmp_path / "leaking", params, leaking)
    (tmp_path / "out" / "config.json").unlink()  # the tensors alone tell how the memory began
    found = model_config(tmp_path / "out", num_heads=cfg.num_heads)
    assert found.memory_init == "by_block"


@pytest.mark.parametrize("layout", ["wan", "diffusers", "arl2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_teacher_comes_back_from_every_layout(tmp_path, cfg, params, layout, dtype):
    teacher = dataclasses.replace(cfg.teacher(), dtype=dtype)
    own = cast_params(without_delta(params), teacher)
    export_params(tmp_path / "out", own, teacher, layout, shard_size=30_000)
    chex.assert_trees_all_equal(
        load_params(tmp_path / "out", teacher, precision="compute"), own, strict=True
    )
    found = model_config(tmp_path / "out", dtype=dtype)
    missing = {"diffusers": ("text_len", "frames_per_block", "lora_rank", "lora_alpha")}
    missing["wan"] = missing["diffusers"][1:]  # what config.json of that program has no field for
    known = {name: getattr(teacher, name) for name in missing.get(layout, ())}
    assert dataclasses.replace(found, **known) == teacher


def test_diffusers_names(tmp_path, cfg, params):
    export_params(tmp_path / "out", without_delta(params), cfg.teacher(), "diffusers")
    tensors = load_file(tmp_path / "out" / SINGLE)
    chex.assert_trees_all_equal(
        from_diffusers(tensors, cfg.teacher()), without_delta(params), strict=True
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_attention_heads"] * config["attention_head_dim"] == cfg.dim


def test_every_layout_gives_the_same_network(tmp_path, cfg, params, clip, apply_clip):
    teacher, own = cfg.teacher(), without_delta(params)
    expected = None
    for layout in ("wan", "diffusers", "arl2"):
        export_params(tmp_path / layout, own, teacher, layout, shard_size=40_000)
        flow = apply_clip(load_params(tmp_path / layout, teacher), teacher, *clip)[0]
        expected = flow if expected is None else expected
        np.testing.assert_array_equal(flow, expected)


def test_merged_updates_of_the_ffn_change_nothing(tmp_path, cfg, params, clip, apply_clip, error):
    export_params(tmp_path / "out", params, cfg, lora="merged")
    names = {name.removeprefix("model.") for name in load_file(tmp_path / "out" / SINGLE)}
    assert "blocks.0.ffn.0.weight" in names and "blocks.0.self_attn.lora_q_A" in names
    assert not any("ffn.0.lora" in name or ".linear." in name for name in names)
    merged = load_params(tmp_path / "out", cfg)
    for i in cfg.hybrid_layers:
        assert not flat(merged)[f"blocks/{i}/delta/lora_fc1/b"].any()
    flow, merged_flow = (apply_clip(p, cfg, *clip)[0] for p in (params, merged))
    assert error(merged_flow, flow) < 1e-5  # float32: (W + A B) x against W x + A (B x)
    dropped = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 0 if "lora_fc" in jax.tree_util.keystr(path) else x, params
    )
    assert error(apply_clip(dropped, cfg, *clip)[0], flow) > 1e-3


def test_weights_before_stage_2_have_no_low_rank_updates(tmp_path, cfg, params):
    own = {path: x for path, x in flat(params).items() if "lora_" not in path}
    export_params(tmp_path / "out", traverse_util.unflatten_dict(own, sep="/"), cfg)
    found = flat(load_params(tmp_path / "out", cfg))
    assert all(np.array_equal(found[path], x) for path, x in own.items())
    assert not any(x.any() for path, x in found.items() if path.endswith("/b") and "lora" in path)


@pytest.mark.parametrize("layout", ["wan", "diffusers"])
def test_hybrid_layers_have_no_place_elsewhere(tmp_path, cfg, params, layout):
    with pytest.raises(WeightsError) as caught:
        export_params(tmp_path / "out", params, cfg, layout)
    assert_one_line(caught, layout, "[0, 1]", "layout=arl2")
    assert not files_of(tmp_path)


def test_unknown_choices_are_one_line(tmp_path, cfg, params):
    for choice in ({"layout": "flux"}, {"lora": "gone"}):
        with pytest.raises(ConfigError, match="take one of") as caught:
            export_params(tmp_path / "out", params, cfg, **choice)
        assert_one_line(caught)


def test_what_is_there_stays(tmp_path, cfg, params, monkeypatch):
    export_params(tmp_path / "out", params, cfg)
    before = (tmp_path / "out" / SINGLE).read_bytes()
    with pytest.raises(StorageError, match="is there already") as caught:
        export_params(tmp_path / "out", params, cfg)
    assert_one_line(caught, tmp_path / "out", "overwrite=True")
    other = jax.tree.map(lambda x: x + 1, params)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file, "_blocks", full)
        with pytest.raises(StorageError, match="No space left") as caught:
            export_params(tmp_path / "out", other, cfg, overwrite=True)
    assert_one_line(caught, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / SINGLE).read_bytes() == before
    export_params(tmp_path / "out", other, cfg, overwrite=True)
    chex.assert_trees_all_equal(load_params(tmp_path / "out", cfg), other, strict=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_import_and_export_of_files(tmp_path, cfg):
    """What the two commands do, from a published file through our folder and back."""
    tensors = original_tensors(cfg)
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / SINGLE)
    facts = {"num_heads": cfg.num_heads, "text_len": cfg.text_len, "lora_alpha": cfg.lora_alpha}
    (source / "config.json").write_text(json.dumps(facts | {"frames_per_block": 2}))
    done = import_weights(source, tmp_path / "ours")
    assert (done.layout, done.tensors) == ("ARL2", len(tensors))
    assert done.parameters == sum(x.size for x in tensors.values())
    assert done.bytes_read == 4 * done.parameters
    assert model_config(tmp_path / "ours") == cfg
    with pytest.raises(StorageError, match="is there already"):
        import_weights(source, tmp_path / "ours")
    with pytest.raises(WeightsError, match="a folder of this program already"):
        import_weights(tmp_path / "ours", tmp_path / "again")
    export_weights(tmp_path / "ours", tmp_path / "theirs")
    found = load_file(tmp_path / "theirs" / SINGLE)
    assert found.keys() == {f"model.{name}" for name in tensors}
    for name, value in tensors.items():
        np.testing.assert_array_equal(found[f"model.{name}"], value, name)


def test_import_makes_layers_hybrid(tmp_path, cfg):
    teacher = original_tensors(cfg.teacher())
    save_file(teacher, tmp_path / "wan.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 2, "text_len": 4}))
    import_weights(
        tmp_path / "wan.safetensors", tmp_path / "ours", hybrid_layers=[1], dtype="bfloat16"
    )
    found = model_config(tmp_path / "ours")
    assert found.hybrid_layers == (1,) and found.num_heads == 2
    params = load_params(tmp_path / "ours", dataclasses.replace(found, dtype="bfloat16"))
    kernel = teacher["blocks.1.self_attn.q.weight"].T.astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(params["blocks"]["1"]["self_attn"]["q"]["kernel"], kernel)
