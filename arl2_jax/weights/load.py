"""Loading of weights, whatever their layout."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from arl2_jax.config import ModelConfig, to_config_dict
from arl2_jax.models import Params, init_params, param_shapes
from arl2_jax.storage import StorageError, differences, is_remote
from arl2_jax.weights.errors import WeightsError
from arl2_jax.weights.folder import load_params_folder
from arl2_jax.weights.wan import INDEX, SINGLE, read_json, read_wan, weight_files

_CONFIG = "config.json"
_FACTS = (
    "dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len", "in_dim",
    "out_dim", "eps", "patch_size",
)  # fmt: skip
_ADDITION = "/delta/"
_RANDOM = "set --config.teacher.weights=random to start from random weights"


def load_params(path: epath.PathLike, cfg: ModelConfig, key: jax.Array | None = None) -> Params:
    """Reads weights into the tree of `init_params`.

    Args:
      path: a folder of `save_params`; a folder in Wan2.1's original layout (config.json and
        diffusion_pytorch_model.safetensors, or its shards and their index); or one safetensors
        file of that layout.
      cfg: the model. Weights without memory may be loaded into a model with hybrid layers: what
        these add is initialised.
      key: for that initialisation; `jax.random.key(0)` by default.

    Returns:
      Nested dict of numpy arrays in host memory, with the shapes and dtypes of `param_shapes(cfg)`.

    Raises:
      WeightsError: if a file is missing or cannot be read, or is of another model (one line each);
        or if tensors are missing, unexpected or mis-shaped (all of them in one message).
    """
    source = epath.Path(path).expanduser()
    targets = _flat(param_shapes(cfg))
    if (source / "params").exists():
        values = _read_saved(source, cfg, targets)
    else:
        backbone = {name: leaf for name, leaf in targets.items() if _ADDITION not in name}
        values = read_wan(_find_wan(source, cfg), backbone)
    if len(values) < len(targets):
        key = jax.random.key(0) if key is None else key
        values |= jax.device_get(_additions(cfg, key))
    return traverse_util.unflatten_dict({name: values[name] for name in targets}, sep="/")


def _flat(tree: Params) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _read_saved(
    source: epath.Path, cfg: ModelConfig, targets: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    try:
        params, config = load_params_folder(source)
    except StorageError as error:
        raise WeightsError(str(error)) from None
    # Without hybrid layers it is a teacher, which any hybrid of it may start from.
    facts = (*_FACTS, "hybrid_layers") if config.get("hybrid_layers") else _FACTS
    _check_facts(source, config, cfg, facts)
    values = _flat(params)
    wanted = {
        name: leaf
        for name, leaf in targets.items()
        if config.get("hybrid_layers") or _ADDITION not in name
    }
    there, here = ({n: list(leaf.shape) for n, leaf in d.items()} for d in (values, wanted))
    problems = differences(there, here)
    if problems:
        raise WeightsError(
            f"{source} does not hold the weights of this model: {'; '.join(problems)}; name other "
            "weights or change --config.model"
        )
    return {name: np.asarray(values[name], leaf.dtype) for name, leaf in wanted.items()}


def _find_wan(source: epath.Path, cfg: ModelConfig) -> list[Path]:
    if is_remote(source):
        raise WeightsError(f"{source} is remote; copy the safetensors files to a local folder")
    path = Path(source)
    if not path.exists():
        raise WeightsError(f"{path.absolute()} does not exist; name another file, or {_RANDOM}")
    if path.is_file():
        if path.suffix != ".safetensors":
            raise WeightsError(f"{path} is not a .safetensors file; name one, or a folder of them")
        return [path]
    if not (path / INDEX).exists() and not (path / SINGLE).exists():
        raise WeightsError(
            f"no weights in {path.absolute()}: looked for {SINGLE}, {INDEX} and params/ there; "
            f"name another folder, or {_RANDOM}"
        )
    if (path / _CONFIG).exists():
        _check_facts(path, read_json(path / _CONFIG), cfg, _FACTS)
    return weight_files(path)


def _check_facts(
    source: epath.PathLike, config: Mapping[str, Any], cfg: ModelConfig, facts: tuple[str, ...]
) -> None:
    ours = json.loads(json.dumps(to_config_dict(cfg)))
    common = [name for name in facts if name in config]
    problems = differences({n: config[n] for n in common}, {n: ours[n] for n in common})
    if problems:
        raise WeightsError(
            f"{source} holds the weights of another model: {', '.join(problems)}; change "
            "--config.model, or name other weights"
        )


@functools.partial(jax.jit, static_argnums=0)
def _additions(cfg: ModelConfig, key: jax.Array) -> dict[str, jax.Array]:
    """What the hybrid layers add, as `init_params` makes it; XLA leaves the rest out."""
    params = _flat(init_params(cfg, key))
    return {name: leaf for name, leaf in params.items() if _ADDITION in name}
