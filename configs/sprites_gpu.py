"""Sprites at true token density on one GPU: blocks of 1600 tokens, heads of 128 dimensions.

    python launch/train.py --config=configs/sprites_gpu.py

Three or four sprites of 18 identities, each in a separate lane, pass and rest behind an occluder
for up to 16 of a clip's 18 frame blocks. The teacher is trained from scratch, all of its layers are
converted, and runs/sprites-gpu/report shows what the states remember. That takes 23 minutes on an
H200. docs/study.md has the measurements. Leave XLA's autotuning on: with
XLA_FLAGS=--xla_gpu_autotune_level=0 a step takes up to 3.7 times as long.

Training begins on clips of a third of the length with short rests: attention over them costs less
per frame, and they have more reveals. A teacher learns there what to look for, a memory what to
keep.

The same task at toy size, to try the whole path on a CPU; little is learned:

    python launch/train.py --config=configs/sprites_gpu.py:quick
"""

from typing import Any, cast

import ml_collections

from arl2_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    SamplerConfig,
    ShortClipsConfig,
    SpriteConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
    TrainConfig,
    to_config_dict,
)


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
    if variant not in ("full", "quick"):
        raise ValueError(f"configs/sprites_gpu.py:{variant} is not known; known is :quick")
    config = Config(
        model=ModelConfig(
            dim=256,
            ffn_dim=1024,
            num_heads=2,
            num_layers=4,
            text_dim=32,
            text_len=64,
            in_dim=12,
            out_dim=12,
            frames_per_block=4,
            lora_rank=32,
            lora_alpha=64.0,
            hybrid_layers=(0, 1, 2, 3),
            memory_init="by_block",
            dtype="bfloat16",
            remat="layer",
        ),
        # A sprite of more pixels is recognizable under more noise: 169 pixels here, 25 in
        # configs/tiny.py. The shift grows with the square root of that, so that as many steps as
        # there depend on the memory.
        sampler=SamplerConfig(method="euler", steps=8, shift=16.0),
        data=DataConfig(
            frames=72,
            height=80,
            width=80,
            codec_factor=2,
            workers=4,
            sprites=SpriteConfig(
                count=(3, 4),
                colors=6,
                shapes=3,
                size=13,
                speed=(6.0, 6.0),
                occluder_width=24,
                pause=(4, 64),
                lamp=4,
                only_reveals=True,
            ),
            short=ShortClipsConfig(frames=24, pause=(4, 10)),
        ),
        teacher=TeacherConfig(
            steps=1150,
            short_steps=600,
            batch_size=8,
            optimizer="muon",
            learning_rate=6e-3,
            learning_rates=(("blocks/.*/kernel$", 2.75),),
            warmup=40,
        ),
        stage1=Stage1Config(
            start="least_squares",
            start_clips=32,
            steps=30,
            batch_size=8,
            learning_rate=1e-2,
            warmup=5,
        ),
        stage2=Stage2Config(
            steps=4000,
            short_steps=3000,
            batch_size=4,
            optimizer="muon",
            learning_rate=1e-2,
            warmup=15,
            ema_decay=0.97,
            layer_loss=0.0,
            control_share=0.2,
        ),
        train=TrainConfig(workdir="runs/sprites-gpu", checkpoint_every=500, keep=1),
        evaluation=EvaluationConfig(
            clips=32, recall_clips=384, recall_noises=1, controls=("zero",), rollout_length=2
        ),
    )
    tree = ml_collections.ConfigDict(to_config_dict(config))
    return tree if variant == "full" else _quick(tree)


def _quick(tree: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Reduce the task to 20 tokens a block, heads of 32 dimensions and a few steps."""
    fields = cast(Any, tree)
    fields.model.update(
        dim=64, ffn_dim=128, freq_dim=32, text_len=8, frames_per_block=2, dtype="float32"
    )
    # 0: the run fills in the tokens of its blocks.
    fields.model.delta.block_tokens = 0
    fields.data.update(frames=24, height=16, width=20, workers=0, held_out=8)
    fields.data.sprites.update(
        count=(2, 2), size=5, speed=(4.0, 4.0), occluder_width=9, pause=(2, 8), lamp=2
    )
    fields.data.short.update(frames=12, pause=(2, 3))
    for phase in (fields.teacher, fields.stage1, fields.stage2):
        phase.update(steps=4, batch_size=2, warmup=1)
    for phase in (fields.teacher, fields.stage2):
        phase.short_steps = 2
    fields.stage1.start_clips = 4
    fields.evaluation.update(clips=2, recall_clips=16, rollout_clips=1)
    fields.train.workdir = "runs/sprites-quick"
    return tree
