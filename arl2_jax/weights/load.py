"""Loading of weights in any known layout."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from arl2_jax.config import (
    RULE_FIELDS,
    GatedDeltaConfig,
    ModelConfig,
    UMT5Config,
    VAEConfig,
    to_config_dict,
)
from arl2_jax.errors import WeightsError
from arl2_jax.json_trees import as_json, differences
from arl2_jax.models import (
    Params,
    cast_backbone,
    cast_params,
    init_params,
    is_added,
    is_ffn_update,
    param_shapes,
)
from arl2_jax.models.umt5 import umt5_shapes
from arl2_jax.models.vae import vae_shapes
from arl2_jax.parameters import facts_of
from arl2_jax.weights.facts import MODEL_FIELDS, stated_fields
from arl2_jax.weights.folder import load_params_folder, saved_shapes
from arl2_jax.weights.layout import detect_layout
from arl2_jax.weights.layouts import umt5, vae
from arl2_jax.weights.layouts.transformer import LAYOUTS
from arl2_jax.weights.read import read_tree
from arl2_jax.weights.release import transformer_of
from arl2_jax.weights.tensors import FileTensor, open_tensors

# Parameters of a model that weights may lack: all that ARL2 adds; its low-rank updates, before
# stage 2; those of the FFN, if they were merged. Initialised low-rank updates are zero.
_MAY_LACK = (is_added, lambda path: is_added(path) and facts_of(path).low_rank, is_ffn_update)
_CASTS = {"master": lambda params, cfg: params, "compute": cast_params, "training": cast_backbone}


def load_params(
    path: epath.PathLike,
    cfg: ModelConfig,
    key: jax.Array | None = None,
    *,
    precision: Literal["master", "compute", "training"] = "master",
    shardings: Any = None,
    entry: str | None = None,
) -> Params:
    """Read weights of a transformer into the tree of `init_params`.

    Args:
      path: a folder of `save_params`; or a file or folder in the layout of Wan2.1, ARL2 or
        Diffusers: safetensors (one, or shards and their index) or .pt; or a release's folder.
      cfg: the model. Weights that lack all that ARL2 adds, or its low-rank updates, may be loaded
        into a model with hybrid layers: missing parameters are initialised.
      key: for that initialisation; `jax.random.key(0)` by default.
      precision: "master" is float32; "compute" has the matrices in the compute type cfg.dtype,
        which takes half the memory in bfloat16; "training" has those of the pretrained network in
        cfg.dtype, and all that conversion adds in float32.
      shardings: a tree of `jax.sharding.Sharding` with the structure of the result; every device
        then gets its slice from the file.
      entry: which of the models in a .pt, e.g. "generator"; by default the averaged one.

    Returns:
      Nested dict with the shapes of `param_shapes(cfg)`: numpy arrays in host memory, or jax arrays
      if shardings are given.

    Raises:
      WeightsError: if a file is missing or cannot be read, is of another model, or holds NaN (one
        line each); or if tensors are missing, unexpected or mis-shaped (all in one message).
    """
    source = transformer_of(path)
    targets = _flat(jax.eval_shape(lambda p: _CASTS[precision](p, cfg), param_shapes(cfg)))
    places = None if shardings is None else _flat(shardings)
    if (source / "params").exists():
        values = _read_saved(source, cfg, targets, places)
    else:
        values = _read_layout(source, cfg, targets, places, entry)
    missing = targets.keys() - values.keys()
    if missing:
        key = jax.random.key(0) if key is None else key
        initial = _initial_additions(cfg, key)
        for path in missing:
            value = np.asarray(initial[path]).astype(targets[path].dtype)
            values[path] = value if places is None else jax.device_put(value, places[path])
    return _nested({path: values[path] for path in targets})


def load_text_encoder(path: epath.PathLike, cfg: UMT5Config, *, shardings: Any = None) -> Params:
    """Read weights of the text encoder into the tree of `init_umt5`.

    Args:
      path: models_t5_*.pth of Wan2.1, or the text_encoder folder of Diffusers; or a file of them.
      cfg, shardings, Raises: as in `load_params`.

    Returns:
      Nested dict with the shapes and dtypes of `umt5_shapes(cfg)`.
    """
    return _read_encoder(path, umt5.LAYOUTS, umt5_shapes(cfg), shardings)


def load_vae(path: epath.PathLike, cfg: VAEConfig, *, shardings: Any = None) -> Params:
    """Read weights of the VAE into the tree of `init_vae`.

    Args:
      path: Wan2.1_VAE.pth, or the vae folder of Diffusers; or a file of them.
      cfg, shardings, Raises: as in `load_params`.

    Returns:
      Nested dict with the shapes and dtypes of `vae_shapes(cfg)`.
    """
    return _read_encoder(path, vae.layouts(cfg), vae_shapes(cfg), shardings)


def _read_encoder(path: epath.PathLike, layouts, shapes: Params, shardings: Any) -> Params:
    places = None if shardings is None else _flat(shardings)
    tensors = open_tensors(path)
    return _nested(read_tree(tensors, layouts, _flat(shapes), where=path, shardings=places))


def _read_layout(
    source: epath.Path, cfg: ModelConfig, targets: Mapping[str, Any], places, entry: str | None
) -> dict[str, Any]:
    tensors = open_tensors(source, entry)
    paths = _paths_in(tensors, source)
    stated = stated_fields(source)
    hybrid = sorted({int(path.split("/")[1]) for path in paths if is_added(path)})
    if hybrid:
        stated["hybrid_layers"] = hybrid
    _check_facts(source, stated, cfg)
    wanted = _without_absent(targets, paths)
    return read_tree(tensors, LAYOUTS, wanted, where=source, shardings=places)


def _paths_in(tensors: Mapping[str, FileTensor], where: object) -> list[str]:
    layout = detect_layout(tensors, LAYOUTS, where)
    return [found[0] for name in tensors if (found := layout.to_path(name))]


def _without_absent(targets: Mapping[str, Any], paths: Iterable[str]) -> dict[str, Any]:
    """Return the targets without those groups of additions that are absent from the weights."""
    absent = [part for part in _MAY_LACK if not any(part(path) for path in paths)]
    return {path: leaf for path, leaf in targets.items() if not any(part(path) for part in absent)}


def _read_saved(
    source: epath.Path, cfg: ModelConfig, targets: Mapping[str, Any], places
) -> dict[str, Any]:
    shapes, config = saved_shapes(source)
    _check_facts(source, config, cfg)
    wanted = _without_absent(targets, shapes)
    there, here = ({n: list(x.shape) for n, x in tree.items()} for tree in (shapes, wanted))
    problems = differences(there, here)
    if problems:
        raise WeightsError(
            f"{source} does not hold the weights of this model: {'; '.join(problems)}",
            remedy="name other weights, or change the model's settings",
        )
    dtypes = {path: leaf.dtype for path, leaf in wanted.items()}
    return _flat(load_params_folder(source, dtypes=dtypes, shardings=places)[0])


def _check_facts(source: epath.PathLike, stated: Mapping[str, Any], cfg: ModelConfig) -> None:
    """Check that model and weights agree on what decides their meaning; teachers fit any hybrid."""
    facts, stated, ours = MODEL_FIELDS, dict(stated), to_config_dict(cfg)
    if stated.get("hybrid_layers"):
        facts = (*MODEL_FIELDS, "hybrid_layers", "lora_alpha", *RULE_FIELDS)
        # Weights from before these fields have the published rule.
        stated |= _rule(stated.get("delta", GatedDeltaConfig()))
        ours |= _rule(cfg.delta)
    common = [name for name in facts if name in stated]
    there, here = ({name: tree[name] for name in common} for tree in (stated, ours))
    problems = differences(as_json(there), as_json(here))
    if problems:
        raise WeightsError(
            f"{source} holds the weights of another model: {', '.join(problems)}",
            remedy="change the model's settings, or name other weights",
        )


def _rule(delta: GatedDeltaConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a memory's settings that decide what its weights mean."""
    values = delta if isinstance(delta, Mapping) else to_config_dict(delta)
    return {name: values[name] for name in RULE_FIELDS if name in values}


@functools.partial(jax.jit, static_argnums=0)
def _initial_additions(cfg: ModelConfig, key: jax.Array) -> dict[str, jax.Array]:
    """Return the additions of `init_params` alone; XLA removes the rest of the computation."""
    params = _flat(init_params(cfg, key))
    return {path: leaf for path, leaf in params.items() if is_added(path)}


def _flat(tree: Params) -> dict[str, Any]:
    return traverse_util.flatten_dict(tree, sep="/")


def _nested(flat: Mapping[str, Any]) -> Params:
    return traverse_util.unflatten_dict(dict(flat), sep="/")
