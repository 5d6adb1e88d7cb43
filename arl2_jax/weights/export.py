"""Export of parameters in the layouts of other programs."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath
from flax import traverse_util

from arl2_jax.config import ModelConfig, to_config_dict
from arl2_jax.errors import ConfigError, StorageError, WeightsError
from arl2_jax.models import Params
from arl2_jax.storage import absolute, is_remote, reason
from arl2_jax.weights.facts import CONFIG, HYBRID_FIELDS, MODEL_FIELDS
from arl2_jax.weights.folder import replace_folder
from arl2_jax.weights.layouts.diffusers import DIFFUSERS
from arl2_jax.weights.layouts.wan import ARL2, WAN, wrapped_name
from arl2_jax.weights.read import export_tensors
from arl2_jax.weights.safetensors_file import ExportTensor, write_shards

_LAYOUTS = {"arl2": ARL2, "wan": WAN, "diffusers": DIFFUSERS}
_LORA = ("apart", "merged")
_EXTRAS = ("refuse", "write")


def export_params(
    path: epath.PathLike,
    params: Params,
    cfg: ModelConfig,
    layout: str = "arl2",
    lora: str = "apart",
    extras: str = "refuse",
    *,
    shard_size: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Write safetensors and config.json into a folder atomically.

    Args:
      path: the folder, local.
      params: nested dict of arrays, written in their own dtypes, a block of rows at a time.
      cfg: their model.
      layout: "arl2" has the names of an ARL2 .pt, "wan" those of Wan2.1's release, "diffusers"
        writes a pipeline's transformer folder. The last two cannot represent hybrid layers.
      lora: "apart" keeps the low-rank updates separate, and can be read back exactly. "merged" adds
        those of the FFN to its kernels; those of q, k and v act on the memory alone and stay
        separate.
      extras: what to do with parts of a memory that ARL2's files cannot represent, the bias of the
        strength and changes of the rule: "refuse", or "write" them as `b_proj.bias` and into
        config.json, where this program finds them and ARL2's own code does not.
      shard_size: bytes above which the file is split into shards with an index.
      overwrite: whether to replace an existing folder.

    Raises:
      ConfigError: a choice is unknown.
      WeightsError: the layout cannot represent the model.
      StorageError: the folder exists already, or cannot be written.
    """
    choices = (("layout", layout, _LAYOUTS), ("lora", lora, _LORA), ("extras", extras, _EXTRAS))
    for name, value, known in choices:
        if value not in known:
            raise ConfigError(
                "is unknown", field=name, value=value, remedy=f"take one of {', '.join(known)}"
            )
    target = absolute(path)
    if is_remote(target):
        raise StorageError(f"{target} is remote", remedy="export to a local folder and copy it")
    if target.exists() and not overwrite:
        raise StorageError(
            f"{target} is there already", remedy="name another folder, or pass overwrite=True"
        )
    flat = traverse_util.flatten_dict(params, sep="/")
    if layout != "arl2" and any("/delta/" in name for name in flat):
        raise WeightsError(
            f"has no place for hybrid layers ({list(cfg.hybrid_layers)})",
            field="layout",
            value=layout,
            remedy="export them with layout=arl2",
        )
    if extras == "refuse":
        _refuse_extras(flat, cfg, layout)
    if lora == "merged" and cfg.lora_rank:
        flat = _merged(flat, cfg.lora_alpha / cfg.lora_rank)
    tensors = _named_tensors(flat, cfg, layout)
    place = Path(target.parent / f".{target.name}.unfinished")
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        write_shards(place, tensors, shard_size)
        (place / CONFIG).write_text(json.dumps(_config(cfg, layout), indent=2) + "\n")
        replace_folder(epath.Path(place), target)
    except OSError as error:
        raise StorageError(
            f"could not write {target}: {reason(error)}",
            remedy="free space there or name another folder",
        ) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _refuse_extras(flat: Mapping[str, Any], cfg: ModelConfig, layout: str) -> None:
    """Raise WeightsError for parameters and settings that ARL2's own code would ignore."""
    found = []
    if any(path.endswith("/delta/beta_bias") for path in flat):
        found.append(f"the bias of the strength (memory_init={cfg.memory_init})")
    if cfg.hybrid_layers:
        found += [f"delta.{name}={value}" for name, value in cfg.delta.rule_changes().items()]
    if found:
        raise WeightsError(
            f"has no place for {', '.join(found)}: ARL2's own code would compute something else",
            field="layout",
            value=layout,
            remedy="pass extras=write to write them all the same, for this program",
        )


def _named_tensors(flat: Mapping[str, Any], cfg: ModelConfig, layout: str) -> list[ExportTensor]:
    sizes = dict(zip("thw", cfg.patch_size, strict=True))
    tensors = export_tensors(flat, dataclasses.replace(_LAYOUTS[layout], sizes=sizes))
    if layout != "arl2":
        return tensors
    wrapped = {path.split("/")[1] for path in flat if "/delta/lora_fc" in path}
    return [tensor._replace(name=f"model.{_arl2_name(tensor.name, wrapped)}") for tensor in tensors]


def _arl2_name(name: str, wrapped: set[str]) -> str:
    """Return ARL2's name of a tensor: with separate low-rank updates the FFN is wrapped."""
    parts = name.split(".")
    return wrapped_name(name) if parts[0] == "blocks" and parts[1] in wrapped else name


class _Merged:
    """Lazy kernel + a b * scale in float32, cast to the kernel's dtype; computed when written."""

    def __init__(self, kernel: Any, a: Any, b: Any, scale: float):
        self.shape, self.dtype, self.size = kernel.shape, kernel.dtype, kernel.size
        self._parts, self._scale = (kernel, a, b), scale

    def __array__(self, dtype=None, copy=None):
        kernel, a, b = (np.asarray(part, np.float32) for part in self._parts)
        return (kernel + a @ b * self._scale).astype(dtype or self.dtype)


def _merged(flat: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Merge the low-rank updates of the FFN into its kernels."""
    merged = {path: leaf for path, leaf in flat.items() if "/delta/lora_fc" not in path}
    for path in flat:
        if "/delta/lora_fc" in path and path.endswith("/a"):
            low_rank = path.removesuffix("/a")
            kernel = low_rank.replace("delta/lora_", "ffn/") + "/kernel"
            merged[kernel] = _Merged(flat[kernel], flat[path], flat[f"{low_rank}/b"], scale)
    return merged


def _config(cfg: ModelConfig, layout: str) -> dict[str, Any]:
    """Return the content of config.json, for "wan" and "diffusers" with those programs' fields."""
    ours = to_config_dict(cfg)
    if layout == "arl2":
        return {name: ours[name] for name in (*MODEL_FIELDS, *HYBRID_FIELDS)}
    if layout == "wan":
        facts = {name: ours[name] for name in MODEL_FIELDS}
        return {"_class_name": "WanModel", "model_type": "t2v"} | facts
    same = ("patch_size", "text_dim", "freq_dim", "ffn_dim", "num_layers", "eps")
    return {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": cfg.num_heads,
        "attention_head_dim": cfg.head_dim,
        "in_channels": cfg.in_dim,
        "out_channels": cfg.out_dim,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    } | {name: ours[name] for name in same}
