"""The whole path on a laptop, with nothing to download.

python launch/train.py --config=configs/tiny.py
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
        model=ModelConfig.tiny(),
        sampler=SamplerConfig(method="euler", steps=8, shift=3.0),
        data=DataConfig(
            frames=12,
            height=12,
            width=32,
            codec_factor=2,
            sprites=SpriteConfig(
                count=(2, 2), size=5, speed=(3.0, 3.0), occluder_width=14
            ),
        ),
        teacher=TeacherConfig(steps=600, batch_size=16, learning_rate=2e-3),
        stage1=PhaseConfig(
            steps=100,
            batch_size=16,
            learning_rate=2e-3,
            learning_rates=(("A_log|dt_bias", 10.0),),
        ),
        stage2=Stage2Config(steps=200, batch_size=16, learning_rate=1e-3),
        train=TrainConfig(),
        evaluation=EvaluationConfig(),
    )
    tree = ml_collections.ConfigDict(to_config_dict(config))
    # Follows --config.data.source, so that runs on other data do not meet in one folder.
    tree.train.workdir = "runs/tiny-" + tree.data.get_ref("source")
    return tree
