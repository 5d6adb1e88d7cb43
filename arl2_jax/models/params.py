"""Parameters of the network as nested dicts: creation, stacking and casts.

There are two forms. In files and in the public tree every layer is separate
(`blocks/3/self_attn/q/kernel`). On devices, neighbouring layers with equal memories are stacked
(`blocks/0-21/self_attn/q/kernel`, with a leading layer axis): one scan runs through them, and the
number of arrays does not grow with depth.
"""

import functools
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from arl2_jax.config import MemorySpec, ModelConfig
from arl2_jax.models.embeddings import Stem
from arl2_jax.models.layer import ADDED, Params, TransformerLayer, additions, to_public
from arl2_jax.parameters import facts_of


def init_params(cfg: ModelConfig, key: Array) -> Params:
    """Return random float32 parameters, unstacked.

    A layer's pretrained weights depend on the key and on its index, not on its memory: the
    teacher's parameters are those of any conversion of it without the "delta" nodes.
    """
    return _init(cfg, key)


@functools.partial(jax.jit, static_argnums=0)
def _init(cfg: ModelConfig, key: Array) -> Params:
    return unstack_params(init_stacked(cfg, key))


def init_stacked(cfg: ModelConfig, key: Array) -> Params:
    """Return the parameters of `init_params`, stacked; for `jax.jit` with output shardings."""
    pure = lambda module: nnx.to_pure_dict(nnx.split(module)[1])
    stem_key, layer_key, added_key = jax.random.split(key, 3)
    plain = MemorySpec("softmax_cache")
    make = lambda key: pure(TransformerLayer(cfg, plain, rngs=nnx.Rngs(key)))
    layer_keys, added_keys = (jax.random.split(k, cfg.num_layers) for k in (layer_key, added_key))
    blocks = {}
    for start, stop in cfg.layer_runs():
        layers = jax.vmap(make)(layer_keys[start:stop])
        add = functools.partial(_init_additions, cfg, cfg.memory_of(start))
        blocks[run_name(start, stop)] = layers | jax.vmap(add)(added_keys[start:stop])
    return pure(Stem(cfg, rngs=nnx.Rngs(stem_key))) | {"blocks": blocks}


def _init_additions(cfg: ModelConfig, spec: MemorySpec, key: Array) -> Params:
    """Return the parameters that a memory adds to the public tree of a layer."""
    memory, updates = additions(cfg, spec, rngs=nnx.Rngs(key))
    modules = {"memory": memory} | ({} if updates is None else {"ffn_updates": updates})
    nodes = {name: nnx.to_pure_dict(nnx.split(module)[1]) for name, module in modules.items()}
    return to_public({name: node for name, node in nodes.items() if node})


def param_shapes(cfg: ModelConfig) -> Params:
    """Return shapes and dtypes of `init_params` without creating arrays."""
    return jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))


def without_delta(params: Params) -> Params:
    """Return the parameters without the additions of conversion; in either form."""
    return params | {"blocks": {i: base_of(layer) for i, layer in params["blocks"].items()}}


def teacher_params(params: Params, cfg: ModelConfig) -> Params:
    """Return the parameters of `cfg.teacher()` from those of a model; in either form."""
    return without_delta(params) if cfg.converted_layers else params


def base_of(layer: Params) -> Params:
    """Return a layer's parameters without the additions of conversion."""
    return {name: node for name, node in layer.items() if name != ADDED}


def stem_of(params: Params) -> Params:
    """Return the parameters outside the layers; in either form."""
    return {name: node for name, node in params.items() if name != "blocks"}


def layer_of(params: Params, layer: int) -> Params:
    """Return the parameters of one layer, from either form."""
    if not is_stacked(params):
        return params["blocks"][str(layer)]
    for start, stop, run in stacked_runs(params):
        if start <= layer < stop:
            return jax.tree.map(operator.itemgetter(layer - start), run)
    raise KeyError(f"no layer {layer} in {list(params['blocks'])}")


def run_name(start: int, stop: int) -> str:
    """Return the name of the stacked layers start, ..., stop - 1: "0-21"."""
    return f"{start}-{stop - 1}"


def is_stacked(params: Params) -> bool:
    """Tell whether layers are stacked."""
    return any("-" in name for name in params.get("blocks", {}))


def stacked_runs(params: Params) -> Iterator[tuple[int, int, Params]]:
    """Yield (start, stop, parameters) of the stacked layers [start, stop), in order."""
    for first, last, name in sorted((*map(int, n.split("-")), n) for n in params["blocks"]):
        yield first, last + 1, params["blocks"][name]


def runs_of(params: Params) -> list[tuple[int, int]]:
    """Return the stacked layers [start, stop) of each run, in order."""
    return [(start, stop) for start, stop, _ in stacked_runs(params)]


def stack_params(params: Params, cfg: ModelConfig) -> Params:
    """Return the parameters with each of the model's runs of equal layers stacked.

    Args:
      params: in either form, of a whole model or a part of it such as a phase's trained parameters.
        Stacked ones are returned unchanged.
      cfg: model.

    Raises:
      ValueError: stacked layers have different memories in this model.
    """
    if is_stacked(params):
        _check_runs(params, cfg)
        return params
    layers = params.get("blocks", {})
    blocks = {}
    for start, stop in cfg.layer_runs():
        own = [layers[str(i)] for i in range(start, stop) if str(i) in layers]
        if own:
            blocks[run_name(start, stop)] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)
    return params | ({"blocks": blocks} if blocks else {})


def _check_runs(params: Params, cfg: ModelConfig) -> None:
    for start, stop in runs_of(params):
        if not any(a <= start and stop <= b for a, b in cfg.layer_runs()):
            raise ValueError(
                f"layers {run_name(start, stop)} are stacked, but have different memories in this "
                "model; unstack_params undoes it"
            )


def unstack_params(params: Params) -> Params:
    """Return the parameters with separate layers; undoes `stack_params`."""
    if not is_stacked(params):
        return params
    blocks = {
        str(i): jax.tree.map(operator.itemgetter(i - start), run)
        for start, stop, run in stacked_runs(params)
        for i in range(start, stop)
    }
    return params | {"blocks": blocks}


def compute_params(params: Params, cfg: ModelConfig) -> Params:
    """Return the parameters stacked and cast for compute; those that already are, at no cost."""
    return cast_params(stack_params(params, cfg), cfg)


def cast_params(params: Params, cfg: ModelConfig) -> Params:
    """Cast weight matrices to the compute dtype; small parameters stay float32."""
    cast = functools.partial(_cast, dtype=jnp.dtype(cfg.dtype))
    return jax.tree_util.tree_map_with_path(cast, params)


def cast_backbone(params: Params, cfg: ModelConfig) -> Params:
    """Cast the pretrained matrices to the compute dtype, in either form; additions stay float32.

    Conversion keeps a model in this form: it trains the additions, and the rest is frozen.
    """
    blocks = {
        name: cast_params(base_of(layer), cfg) | ({ADDED: layer[ADDED]} if ADDED in layer else {})
        for name, layer in params["blocks"].items()
    }
    return cast_params(stem_of(params), cfg) | {"blocks": blocks}


def compute_shapes(cfg: ModelConfig) -> Params:
    """Return shapes and dtypes of `init_params` after `cast_params`."""
    return jax.eval_shape(functools.partial(cast_params, cfg=cfg), param_shapes(cfg))


def _cast(path, leaf, dtype):
    name = "/".join(str(entry.key) for entry in path)
    return leaf if facts_of(name).keep_float32 else leaf.astype(dtype)
