"""Every rule of the configuration refuses what breaks it, in one line that names the field."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import ml_collections
import pytest

from arl2_jax.config import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    SamplerConfig,
    SpriteConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
    TrainConfig,
    from_config_dict,
    to_config_dict,
)
from arl2_jax.errors import ConfigError

ROOT = Path(__file__).parents[1]


def changed(path, value):
    """The fields of a good configuration with one of them replaced, or removed by `...`."""
    tree = to_config_dict(Config(ModelConfig.tiny()))
    *groups, name = path.split(".")
    node = tree
    for group in groups:
        node = node[group]
    if value is ...:
        del node[name]
    else:
        node[name] = value
    return tree


def refused(path, value):
    with pytest.raises(ConfigError) as caught:
        from_config_dict(changed(path, value))
    message = str(caught.value)
    assert "\n" not in message
    return message


# Field, bad value, and what the message must say besides the field.
BROKEN = [
    ("teacher.short_steps", 1001, "0..1000"),
    ("stage2.short_steps", -1, "0..1000"),
    ("stage1.short_steps", 5, "data.short.frames"),
    ("data.short.frames", -2, "negative"),
    ("data.short.frames", 3, "divides data.frames=10"),
    ("data.short.frames", 4, "divides data.frames=10"),
    ("data.short.pause", (3, 2), "rising"),
    ("model.dim", 0, "positive"),
    ("model.dim", 130, "even head dimension"),
    ("model.num_heads", 64, "even head dimension"),
    ("model.num_heads", -4, "positive"),
    ("model.ffn_dim", 0, "positive"),
    ("model.num_layers", 0, "positive"),
    ("model.frames_per_block", 0, "positive"),
    ("model.lora_rank", -1, "negative"),
    ("model.freq_dim", 33, "even"),
    ("model.patch_size", (2, 2, 2), "one latent frame"),
    ("model.patch_size", (1, 2), "3 entries"),
    ("model.hybrid_layers", (0, 4, 9), "[4, 9]"),
    ("model.hybrid_layers", (-1,), "0..2"),
    ("model.hybrid_layers", "0", "sequence"),
    ("model.hybrid_layers", ("a",), "int"),
    ("model.memory_gate", "open", "learned, zero"),
    ("model.memory_init", "by_frame", "published, by_block"),
    ("model.lora_init", "zero", "fan_in, published"),
    ("model.delta.block_tokens", -1, "negative"),
    ("model.delta.time_constants", (2.0, 1.0), "rising"),
    ("model.delta.time_constants", (0.0, 1.0), "rising"),
    ("model.delta.write_load", 0.0, "positive"),
    ("model.delta.read_gain", -1.0, "positive"),
    ("model.delta.rule", "hebbian", "delta, additive"),
    ("model.delta.decay", "fixed", "learned, none"),
    ("model.delta.beta_max", 2.5, "(0, 2]"),
    ("model.delta.read", "frame", "block, token"),
    ("model.delta.span", "clip", "video, block"),
    ("model.delta.leak", 1.0, "[0, 1)"),
    ("model.delta.leak", -0.1, "[0, 1)"),
    ("model.dtype", "float16", "float32, bfloat16"),
    ("model.remat", "all", "none, dots, attention, layer"),
    ("model.dim", 128.5, "int"),
    ("model.dim", True, "int"),
    ("model.eps", "small", "float"),
    ("model.dim", None, "int"),
    ("model", 3, "group"),
    ("sampler.method", "heun", "few_step, euler"),
    ("sampler.timesteps", (), "fall"),
    ("sampler.timesteps", (500.0, 750.0), "fall"),
    ("sampler.timesteps", (1001.0,), "(0, 1000]"),
    ("sampler.timesteps", (1000.0, 0.0), "(0, 1000]"),
    ("sampler.steps", 0, "positive"),
    ("sampler.shift", 0.0, "positive"),
    ("sampler.guidance", 0.5, "at least 1"),
    ("sampler.guidance", 3.0, "sampler.method=euler"),
    ("sampler.context_noise", 1.0, "[0, 1)"),
    ("sampler.context_noise", -0.1, "[0, 1)"),
    ("sampler.context_noise", float("nan"), "[0, 1)"),
    ("data.source", "web", "synthetic, video, latents"),
    ("data.source", "video", "data.path"),
    ("data.frames", 0, "positive"),
    ("data.frames", 9, "model.frames_per_block=2"),
    ("data.height", 13, "data.codec_factor=2"),
    ("data.width", 30, "patch"),
    ("data.height", 0, "positive"),
    ("data.fps", 0.0, "positive"),
    ("data.workers", -1, "negative"),
    ("data.held_out", 0, "positive"),
    ("data.codec", "wan_vae", "preparation"),
    ("data.codec", "png", "space_to_depth, wan_vae"),
    ("data.vae", "folder", "wan_vae"),
    ("data.sprites.count", (2, 1), "rising"),
    ("data.sprites.count", (0, 1), "rising"),
    ("data.sprites.speed", (0.0, 1.0), "rising"),
    ("data.sprites.colors", 9, "2..8"),
    ("data.sprites.shapes", 0, "1..5"),
    ("data.sprites.size", 2, "3 pixels"),
    ("data.sprites.lamp", -1, "negative"),
    ("phases", ("stage1", "teacher"), "order"),
    ("phases", ("stage1", "stage1"), "once"),
    ("phases", ("stage3",), "stage3"),
    ("teacher.steps", -1, "negative"),
    ("teacher.batch_size", 0, "positive"),
    ("stage1.accumulation", 0, "positive"),
    ("stage1.accumulation", 3, "stage1.batch_size=16 must be a multiple of"),
    ("stage1.learning_rate", 0.0, "positive"),
    ("stage1.clip_norm", 0.0, "positive"),
    ("stage1.ema_decay", 1.0, "[0, 1)"),
    ("stage1.learning_rates", (("lora",),), "2 entries"),
    ("stage2.layer_loss", -0.1, "negative"),
    ("stage2.self_rollout", 1.5, "[0, 1]"),
    ("stage2.control_share", 0.0, "(0, 1]"),
    ("stage2.control_share", 1.5, "(0, 1]"),
    ("train.workdir", "", "name the folder"),
    ("train.log_every", 0, "positive"),
    ("train.checkpoint_every", 0, "positive"),
    ("train.keep", 0, "positive"),
    ("train.mesh.data", 0, "positive"),
    ("train.mesh.fsdp", -1, "at most once"),
    ("train.mesh.context", 0, "positive"),
    ("data.sprites.pause", (3, 2), "rising"),
    ("data.sprites.pause", (-1, 2), "rising"),
    ("evaluation.controls", ("zero", "open"), "zero and local"),
    ("evaluation.controls", ("zero", "zero"), "once"),
    ("evaluation.controls", "zero", "sequence"),
    ("evaluation.recall_clips", 7, "even"),
    ("evaluation.recall_noises", 0, "positive"),
]
# Fields whose rule is about several: the mesh's axes together, or one after its phase's batch size.
NAMED_AS = {
    "train.mesh.data": "train.mesh=",
    "train.mesh.fsdp": "train.mesh=",
    "train.mesh.context": "train.mesh=",
    "stage1.accumulation": "accumulation=",
}


@pytest.mark.parametrize(("field", "value", "says"), BROKEN, ids=[f"{f}={v}" for f, v, _ in BROKEN])
def test_broken_rule_is_named(field, value, says):
    message = refused(field, value)
    assert NAMED_AS.get(field, field) in message
    assert says in message


def test_phase_is_named_once():
    assert refused("stage1.ema_decay", 2.0).startswith("stage1.ema_decay=2.0")
    assert refused("stage2.self_rollout", 2.0).count("stage2.") == 1


def test_unknown_field_gets_a_suggestion():
    assert refused("model.num_layer", 3) == (
        "model.num_layer is an unknown field; did you mean model.num_layers?"
    )
    assert "did you mean data.sprites.colors?" in refused("data.sprites.colours", 3)
    assert "known are" in refused("zebra", 1)


def test_missing_field_is_named():
    assert refused("model.dim", ...) == "model.dim is missing; set it"
    assert "model" in refused("model", ...)


def test_conversion_needs_hybrid_layers():
    assert "model.hybrid_layers is empty" in refused("model.hybrid_layers", ())
    tree = changed("phases", ("teacher",))
    tree["model"]["hybrid_layers"] = ()
    assert from_config_dict(tree).phases == ("teacher",)


def test_there_and_back():
    config = Config(
        ModelConfig.tiny(hybrid_layers=(0, 2), dtype="bfloat16"),
        SamplerConfig(method="euler", guidance=3.0, context_noise=0.1),
        DataConfig(source="video", path="videos", sprites=SpriteConfig(count=(1, 2))),
        ("stage1", "stage2"),
        TeacherConfig(weights="folder"),
        Stage1Config(learning_rates=(("lora", 2.0), ("A_log", 0.1)), start="least_squares"),
        Stage2Config(self_rollout=0.5),
        TrainConfig(mesh=MeshConfig(2, -1, 2)),
    )
    tree = to_config_dict(config)
    assert from_config_dict(tree) == config
    assert from_config_dict(ml_collections.ConfigDict(tree)) == config
    assert from_config_dict(ml_collections.FrozenConfigDict(tree)) == config
    assert from_config_dict(json.loads(json.dumps(tree))) == config  # lists for tuples
    assert hash(config) == hash(from_config_dict(tree))


def test_what_is_left_out_takes_its_default():
    tree = {"model": to_config_dict(ModelConfig.tiny()), "data": {"fps": 16}}
    config = from_config_dict(tree)
    assert config == Config(ModelConfig.tiny(), data=DataConfig(fps=16.0))
    assert isinstance(config.data.fps, float)


@pytest.mark.parametrize("variant", ["tiny", "wan1p3b", "wan1p3b:random"])
def test_configs_of_the_repository_are_good(variant):
    name, *argument = variant.split(":")
    path = ROOT / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tree = module.get_config(*argument)
    config = from_config_dict(tree)
    with tree.unlocked():
        tree.train.seed = 5
    again = from_config_dict(tree)
    assert again == dataclasses.replace(config, train=dataclasses.replace(config.train, seed=5))


def test_layers_fall_into_runs():
    cfg = ModelConfig.tiny(num_layers=6, hybrid_layers=(5, 1, 2, 2))
    assert cfg.hybrid_layers == (1, 2, 5)
    assert cfg.layer_runs() == [(0, 1), (1, 3), (3, 5), (5, 6)]
    assert [cfg.memory_of(i).kind for i in (0, 1)] == ["softmax_cache", "gated_delta"]
    assert cfg.teacher().layer_runs() == [(0, 6)]
    assert dataclasses.replace(cfg, hybrid_layers=range(6)).layer_runs() == [(0, 6)]


def test_derived_sizes():
    config = Config(ModelConfig.tiny())
    assert config.latent_shape == (6, 16, 12)
    assert (config.tokens_per_frame, config.blocks) == (24, 5)
    assert ModelConfig.wan1p3b().head_dim == ModelConfig.wan14b().head_dim == 128
