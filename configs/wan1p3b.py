"""Wan2.1 T2V 1.3B, 22 of 30 layers converted (as the paper's example), 480 x 832.

    python launch/train.py --config=configs/wan1p3b.py \
        --config.teacher.weights=FOLDER --config.data.path=FOLDER

teacher.weights: folder of the released checkpoint (config.json and
diffusion_pytorch_model.safetensors); the causal teacher that is to be converted.
data.path: stored latents with text embeddings (see arl2_jax/data/latents.py).

Without either, at true shapes, to try a machine:

    python launch/train.py --config=configs/wan1p3b.py \
        --config.teacher.weights=random --config.data.source=synthetic

Hardware: GPUs or TPUs with 80 GB or more each; batches are shared out over all devices.
"""

import ml_collections

from arl2_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    PhaseConfig,
    SamplerConfig,
    SpriteConfig,
    Stage2Config,
    TeacherConfig,
    TrainConfig,
    to_config_dict,
)


def get_config() -> ml_collections.ConfigDict:
    config = Config(
        model=ModelConfig.wan1p3b(hybrid_layers=tuple(range(22))),
        sampler=SamplerConfig(
            method="few_step", timesteps=(1000.0, 750.0, 500.0, 250.0), shift=5.0
        ),
        data=DataConfig(
            source="latents",
            path="data/wan1p3b-latents",
            frames=21,
            # 60 x 104 latents; the Wan VAE takes 480 x 832 pixels to them, the lossless codec of
            # the synthetic videos 120 x 208.
            height=120,
            width=208,
            codec_factor=2,
            fps=16.0,
            held_out=16,
            sprites=SpriteConfig(size=20, speed=(12.0, 12.0), occluder_width=80),
        ),
        phases=("stage1", "stage2"),
        teacher=TeacherConfig(
            weights="checkpoints/Wan2.1-T2V-1.3B", steps=10_000, batch_size=64, learning_rate=1e-5
        ),
        stage1=PhaseConfig(steps=2000, batch_size=16, learning_rate=1e-3, warmup=100),
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
            clips=4, recall_clips=0, control=False, rollout_clips=1, rollout_length=4
        ),
    )
    return ml_collections.ConfigDict(to_config_dict(config))
