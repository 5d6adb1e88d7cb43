"""Wan2.1 T2V 1.3B, 22 of 30 layers converted (as the paper's example), 480 x 832.

    python launch/train.py --config=configs/wan1p3b.py --config.teacher.weights=causal_forcing.pt \
        --config.data.path=data/latents --config.data.vae=Wan2.1-T2V-1.3B

teacher.weights: the causal teacher to convert, in any released layout.
data.path: stored latents with text embeddings, as launch/prepare_data.py writes them.
data.vae: the release with the VAE, for the report's videos; may be left out.

To try a machine at the same shapes, with random weights and synthetic clips:

    python launch/train.py --config=configs/wan1p3b.py:random

Hardware: GPUs or TPUs with 80 GB or more each; batches are sharded over all devices.
"""

from typing import Any, cast

import ml_collections

from arl2_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    SamplerConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
    TrainConfig,
    to_config_dict,
)


def get_config(variant: str = "released") -> ml_collections.ConfigDict:
    if variant not in ("released", "random"):
        raise ValueError(f"configs/wan1p3b.py:{variant} is not known; known is :random")
    config = Config(
        model=ModelConfig.wan1p3b(hybrid_layers=tuple(range(22)), memory_init="by_block"),
        sampler=SamplerConfig(
            method="few_step", timesteps=(1000.0, 750.0, 500.0, 250.0), shift=5.0
        ),
        data=DataConfig(
            source="latents",
            path="data/wan1p3b-latents",
            frames=21,
            codec="wan_vae",
            codec_factor=8,
            height=480,
            width=832,
            fps=16.0,
            held_out=16,
        ),
        phases=("stage1", "stage2"),
        teacher=TeacherConfig(
            weights="checkpoints/Wan2.1-T2V-1.3B", steps=10_000, batch_size=64, learning_rate=1e-5
        ),
        stage1=Stage1Config(steps=2000, batch_size=16, learning_rate=1e-3, warmup=100),
        stage2=Stage2Config(
            steps=4000,
            batch_size=16,
            learning_rate=2e-4,
            warmup=200,
            ema_decay=0.999,
            layer_loss=0.1,
            self_rollout=0.1,
        ),
        train=TrainConfig(workdir="runs/wan1p3b", checkpoint_every=250),
        evaluation=EvaluationConfig(
            clips=4, recall_clips=0, controls=(), rollout_clips=1, rollout_length=4
        ),
    )
    tree = ml_collections.ConfigDict(to_config_dict(config))
    return tree if variant == "released" else _random(tree)


def _random(tree: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Replace weights and data by random ones of the same shapes; nothing is learned."""
    fields = cast(Any, tree)
    fields.teacher.weights = "random"
    # The lossless codec makes 60 x 104 latents of 16 channels of 120 x 208 pixels.
    fields.data.update(
        source="synthetic", path="", codec="space_to_depth", codec_factor=2, height=120, width=208
    )
    fields.data.sprites.update(size=20, speed=(12.0, 12.0), occluder_width=80)
    fields.train.workdir = "runs/wan1p3b-random"
    return tree
