"""Model configurations inferred from weights: from config.json, and from the tensors' shapes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath

from arl2_jax.config import GatedDeltaConfig, ModelConfig, UMT5Config, VAEConfig
from arl2_jax.errors import ConfigError, WeightsError
from arl2_jax.json_trees import differences
from arl2_jax.storage import absolute
from arl2_jax.weights.axes import fit_axes
from arl2_jax.weights.layout import detect_layout
from arl2_jax.weights.layouts import umt5, vae
from arl2_jax.weights.layouts.transformer import LAYOUTS
from arl2_jax.weights.release import transformer_of
from arl2_jax.weights.tensors import open_tensors, read_json

CONFIG = "config.json"
# Fields of `ModelConfig` that belong to the weights; Wan's own config.json has the first of them.
MODEL_FIELDS = (
    "dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len", "in_dim",
    "out_dim", "eps", "patch_size",
)  # fmt: skip
HYBRID_FIELDS = (
    "hybrid_layers", "lora_rank", "lora_alpha", "frames_per_block", "memory_gate", "memory_init",
    "delta", "memories",
)  # fmt: skip
# Other programs' names of the same fields.
_MODEL_NAMES = {
    "num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim",
}  # fmt: skip
_UMT5_NAMES = {
    "vocab_size": "vocab_size", "d_model": "dim", "d_ff": "ffn_dim", "num_heads": "num_heads",
    "d_kv": "head_dim", "num_layers": "num_layers", "layer_norm_epsilon": "eps",
    "relative_attention_num_buckets": "num_buckets",
    "relative_attention_max_distance": "max_distance",
}  # fmt: skip
_VAE_NAMES = {
    "base_dim": "dim", "dim_mult": "dim_mult", "num_res_blocks": "num_res_blocks",
    "temperal_downsample": "temporal_downsample", "z_dim": "z_dim",
    "latents_mean": "latents_mean", "latents_std": "latents_std",
}  # fmt: skip
_HEAD_DIM = 128


class Shapes:
    """Shapes of tensors by the path of their parameter; ambiguous ones are left out."""

    def __init__(self, path: epath.PathLike, layouts, entry: str | None = None):
        tensors = open_tensors(path, entry)
        layout = detect_layout(tensors, layouts, path)
        self._where = path
        self._shapes: dict[str, tuple[int, ...]] = {}
        for name, tensor in tensors.items():
            target, pattern = layout.to_path(name) or ("", "")
            axes = fit_axes(pattern, tensor.shape, None, layout.sizes)
            if target:
                self._shapes[target] = axes.shape if axes else ()

    def paths(self, part: str = "") -> list[str]:
        """Return the paths that contain the part."""
        return [path for path in self._shapes if part in path]

    def of(self, path: str, axis: int) -> int:
        """Return the size of one axis."""
        shape = self._shapes.get(path, ())
        if not -len(shape) <= axis < len(shape):
            raise WeightsError(
                f"{self._where} does not determine its model: {path} is missing or has another "
                "number of axes",
                remedy="name other weights",
            )
        return shape[axis]

    def layers(self, part: str = "") -> list[int]:
        """Return the indices of the layers that have parameters with the part in their path."""
        return sorted({int(p.split("/")[1]) for p in self.paths(part) if p.startswith("blocks/")})


def model_config(path: epath.PathLike, *, entry: str | None = None, **choices: Any) -> ModelConfig:
    """Infer the model of a transformer's weights.

    Args:
      path: any path that `load_params` reads.
      entry: which of the models in a .pt.
      **choices: fields of the result that take precedence, e.g. dtype or hybrid_layers.

    Returns:
      The model. head_dim defaults to 128 if the number of heads is unknown.

    Raises:
      WeightsError: config.json and the tensors disagree, or neither has a field.
    """
    path = transformer_of(path)
    stated = stated_fields(path)
    if (path / "params").exists():
        return ModelConfig(**stated | choices)
    shapes = Shapes(path, LAYOUTS, entry)
    patch = stated.get("patch_size", ModelConfig.patch_size)
    found: dict[str, Any] = {
        "dim": shapes.of("blocks/0/ffn/fc1/kernel", 0),
        "ffn_dim": shapes.of("blocks/0/ffn/fc1/kernel", 1),
        "num_layers": len(shapes.layers()),
        "freq_dim": shapes.of("time_embedding/fc1/kernel", 0),
        "text_dim": shapes.of("text_embedding/fc1/kernel", 0),
        "in_dim": shapes.of("patch_embedding/kernel", 0) // math.prod(patch),
        "out_dim": shapes.of("head/linear/kernel", 1) // math.prod(patch),
        "hybrid_layers": tuple(shapes.layers("/delta/")),
    }
    for layer in shapes.layers("/delta/A_log")[:1]:
        found["num_heads"] = shapes.of(f"blocks/{layer}/delta/A_log", 0)
    if shapes.paths("/delta/beta_bias"):
        found["memory_init"] = "by_block"
    for layer in shapes.layers("/delta/lora_q/a")[:1]:
        found["lora_rank"] = shapes.of(f"blocks/{layer}/delta/lora_q/a", 1)
    check_stated(path, stated, found)
    if found["hybrid_layers"] and not shapes.paths("/delta/lora_"):
        found = {"lora_rank": 0} | found
    if found["dim"] % _HEAD_DIM == 0:
        found = {"num_heads": found["dim"] // _HEAD_DIM} | found
    elif "num_heads" not in stated | found | choices:
        raise WeightsError(
            f"{path} has no {CONFIG} with num_heads, and its width "
            f"dim={found['dim']} is no multiple of {_HEAD_DIM}",
            remedy="name num_heads",
        )
    return ModelConfig(**found | stated | choices)


def umt5_config(path: epath.PathLike, **choices: Any) -> UMT5Config:
    """Infer the text encoder of weights in one of its layouts; as `model_config`."""
    stated = stated_fields(path, _UMT5_NAMES)
    shapes = Shapes(path, umt5.LAYOUTS)
    heads = shapes.of("blocks/0/attn/relative_bias", 1)
    found: dict[str, Any] = {
        "vocab_size": shapes.of("token_embedding/embedding", 0),
        "dim": shapes.of("token_embedding/embedding", 1),
        "ffn_dim": shapes.of("blocks/0/ffn/fc1/kernel", 1),
        "num_heads": heads,
        "head_dim": shapes.of("blocks/0/attn/q/kernel", 1) // heads,
        "num_layers": len(shapes.layers()),
        "num_buckets": shapes.of("blocks/0/attn/relative_bias", 0),
    }
    check_stated(path, stated, found)
    return UMT5Config(**found | stated | choices)


def vae_config(path: epath.PathLike, **choices: Any) -> VAEConfig:
    """Infer the VAE of weights in one of its layouts; as `model_config`.

    Multiples and strides of the levels are those of Wan2.1 if config.json does not state them.
    """
    stated = stated_fields(path, _VAE_NAMES)
    cfg = VAEConfig(**stated | choices)
    shapes = Shapes(path, vae.layouts(cfg))
    found: dict[str, Any] = {
        "dim": shapes.of("encoder/conv_in/kernel", -1),
        "z_dim": shapes.of("decoder/post_quant_conv/kernel", 0),
    }
    check_stated(path, stated, found)
    return VAEConfig(**found | stated | choices)


def stated_fields(path: epath.PathLike, names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the fields in config.json next to weights, under our names; none without that file.

    Args:
      path: weights. A config.json next to a .pt is ignored.
      names: the file's names of fields -> ours; by default those of a transformer.
    """
    source = absolute(path)
    if source.suffix in (".pt", ".pth"):
        return {}
    file = (source if source.is_dir() else source.parent) / CONFIG
    if not file.exists():
        return {}
    content = read_json(Path(file))
    if names is None:
        names = {name: name for name in (*MODEL_FIELDS, *HYBRID_FIELDS)} | _MODEL_NAMES
        if "attention_head_dim" in content and "num_attention_heads" in content:
            content["dim"] = content["num_attention_heads"] * content["attention_head_dim"]
    stated = {names[name]: value for name, value in content.items() if name in names}
    stated = {n: tuple(v) if isinstance(v, list) else v for n, v in stated.items() if v is not None}
    if "delta" in stated:
        stated["delta"] = _delta_config(stated["delta"], file)
    return stated


def _delta_config(stored: Any, file: object) -> GatedDeltaConfig:
    try:
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()
        }
        return GatedDeltaConfig(**values)
    except (AttributeError, TypeError, ConfigError) as error:
        raise WeightsError(
            f"{file} has delta={stored}, which are not settings of this memory: {error}",
            remedy="copy the file from the same place as the weights",
        ) from None


def check_stated(path: epath.PathLike, stated: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise WeightsError if config.json and the tensors disagree on a field."""
    common = sorted(stated.keys() & found.keys())
    problems = differences({n: stated[n] for n in common}, {n: found[n] for n in common})
    if problems:
        text = (
            "; ".join(problems).replace(" there", f" in {CONFIG}").replace(" here", " in the file")
        )
        raise WeightsError(
            f"{path} is not of one model: {text}", remedy="copy both from the same place"
        )
