"""The whole path within minutes on two CPU cores, without downloads.

    python launch/train.py --config=configs/tiny.py

A softmax teacher is trained from scratch on sprites that pass and rest behind an occluder, all of
its layers are converted, and runs/tiny-synthetic/report shows whether the states remember what was
hidden, for one to seven blocks. To keep softmax in the last layer:

    python launch/train.py --config=configs/tiny.py --config.model.hybrid_layers='(0, 1)' \
        --config.train.workdir=runs/tiny-keep-last

On any folder of videos:

    python launch/train.py --config=configs/tiny.py \
        --config.data.source=video --config.data.path=FOLDER
"""

from typing import Any, cast

import ml_collections

from arl2_jax.config import (
    Config,
    DataConfig,
    ModelConfig,
    SamplerConfig,
    SpriteConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
    to_config_dict,
)


def get_config() -> ml_collections.ConfigDict:
    config = Config(
        model=ModelConfig.tiny(hybrid_layers=(0, 1, 2), memory_init="by_block"),
        sampler=SamplerConfig(method="euler", steps=8, shift=8.0),
        data=DataConfig(
            frames=20,
            height=8,
            width=24,
            codec_factor=2,
            sprites=SpriteConfig(
                count=(1, 1),
                shapes=2,
                size=5,
                speed=(5.0, 5.0),
                occluder_width=10,
                pause=(2, 13),
                lamp=2,
                only_reveals=True,
            ),
        ),
        teacher=TeacherConfig(
            steps=700,
            batch_size=8,
            optimizer="muon",
            learning_rate=8e-3,
            # For the matrices, which Muon trains; other parameters diverge at this rate.
            learning_rates=(("blocks/.*/kernel$", 2.75),),
            warmup=40,
        ),
        stage1=Stage1Config(
            start="least_squares",
            start_clips=32,
            steps=20,
            batch_size=16,
            learning_rate=1e-2,
            warmup=5,
        ),
        stage2=Stage2Config(
            steps=900,
            batch_size=4,
            optimizer="muon",
            learning_rate=2e-2,
            warmup=15,
            ema_decay=0.97,
            layer_loss=0.0,
            control_share=0.25,
        ),
    )
    tree = cast(Any, ml_collections.ConfigDict(to_config_dict(config)))
    # Follows --config.data.source, so that runs on different data have different folders.
    tree.train.workdir = "runs/tiny-" + tree.data.get_ref("source")
    return tree
