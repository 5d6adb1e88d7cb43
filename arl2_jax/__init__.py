"""ARL2 in JAX: softmax video diffusion models that attend locally and remember linearly.

    import arl2_jax as arl2

    cfg = arl2.model_config(folder)
    params = arl2.load_params(folder, cfg)
    for block in arl2.Generator(cfg, params, sampler, latent_shape=(60, 104, 16)).stream(...):
        ...

Names are imported when they are first used: `import arl2_jax` does not import jax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arl2_jax.codecs import load_wan_codec
    from arl2_jax.config import Config, MemorySpec, ModelConfig, SamplerConfig, WindowConfig
    from arl2_jax.errors import ConfigError, DataError, StorageError, UserError, WeightsError
    from arl2_jax.generation.generator import Generator
    from arl2_jax.generation.rollout import rollout
    from arl2_jax.models import (
        apply,
        apply_clip,
        encode_text,
        init_memory,
        init_params,
        param_shapes,
    )
    from arl2_jax.models.hybrid_attention import HybridAttention
    from arl2_jax.models.transformer import WanTransformer
    from arl2_jax.text import encode_prompts
    from arl2_jax.weights import export_params, load_params, model_config
    from arl2_jax.weights.folder import save_params

__all__ = [
    "Config",
    "ConfigError",
    "DataError",
    "Generator",
    "HybridAttention",
    "MemorySpec",
    "ModelConfig",
    "SamplerConfig",
    "StorageError",
    "UserError",
    "WanTransformer",
    "WeightsError",
    "WindowConfig",
    "apply",
    "apply_clip",
    "encode_prompts",
    "encode_text",
    "export_params",
    "init_memory",
    "init_params",
    "load_params",
    "load_wan_codec",
    "model_config",
    "param_shapes",
    "rollout",
    "save_params",
]

_HOMES = {
    "Config": "config",
    "ConfigError": "errors",
    "DataError": "errors",
    "Generator": "generation.generator",
    "HybridAttention": "models.hybrid_attention",
    "MemorySpec": "config",
    "ModelConfig": "config",
    "SamplerConfig": "config",
    "StorageError": "errors",
    "UserError": "errors",
    "WanTransformer": "models.transformer",
    "WeightsError": "errors",
    "WindowConfig": "config",
    "apply": "models",
    "apply_clip": "models",
    "encode_prompts": "text",
    "encode_text": "models",
    "export_params": "weights",
    "init_memory": "models",
    "init_params": "models",
    "load_params": "weights",
    "load_wan_codec": "codecs",
    "model_config": "weights",
    "param_shapes": "models",
    "rollout": "generation.rollout",
    "save_params": "weights.folder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
