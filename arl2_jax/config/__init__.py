"""Configuration: frozen dataclasses, presets of released models, strict conversion.

Facts of a released model are in the presets of `ModelConfig`; choices are in the files under
`configs/`. Every rule is checked when an object is created, before anything is compiled.
"""

from arl2_jax.config.convert import from_config_dict, to_config_dict
from arl2_jax.config.data import DataConfig, ShortClipsConfig, SpriteConfig
from arl2_jax.config.memory import (
    MEMORY_SETTINGS,
    RULE_FIELDS,
    GatedDeltaConfig,
    MemorySettings,
    MemorySpec,
    WindowConfig,
)
from arl2_jax.config.model import AttentionConfig, ModelConfig, SamplerConfig
from arl2_jax.config.run import PHASES, Config, EvaluationConfig, short_run
from arl2_jax.config.training import (
    MeshConfig,
    PhaseConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
    TrainConfig,
    with_steps,
)
from arl2_jax.config.umt5 import UMT5Config
from arl2_jax.config.vae import VAEConfig

__all__ = [
    "MEMORY_SETTINGS",
    "PHASES",
    "RULE_FIELDS",
    "AttentionConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "GatedDeltaConfig",
    "MemorySettings",
    "MemorySpec",
    "MeshConfig",
    "ModelConfig",
    "PhaseConfig",
    "SamplerConfig",
    "ShortClipsConfig",
    "SpriteConfig",
    "Stage1Config",
    "Stage2Config",
    "TeacherConfig",
    "TrainConfig",
    "UMT5Config",
    "VAEConfig",
    "WindowConfig",
    "from_config_dict",
    "short_run",
    "to_config_dict",
    "with_steps",
]
