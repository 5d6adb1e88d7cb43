"""Parameters of the network as nested dicts: made, cast and stacked.

In the public tree every layer stands alone (`blocks/0/self_attn/q/kernel`). Computation stacks runs
of equal layers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from arl2_jax.config import MemorySpec, ModelConfig
from arl2_jax.models.embeddings import Stem
from arl2_jax.models.layer import ADDED, Params, TransformerLayer, additions, to_public
from arl2_jax.parameters import facts_of


class StackedParams(NamedTuple):
    """Parameters in the form in which they are computed with.

    Attributes:
      stem: everything outside the layers.
      runs: one tree per run of equal layers, each leaf with a leading layer axis.
    """

    stem: Params
    runs: tuple[Params, ...]


def init_params(cfg: ModelConfig, key: Array) -> Params:
    """Random parameters, float32, a nested dict with string keys.

    A layer's pretrained weights depend on the key and on its index, not on its memory: the
    teacher's parameters are those of any conversion of it, less the "delta" nodes.
    """
    return _init(cfg, key)


@functools.partial(jax.jit, static_argnums=0)
def _init(cfg: ModelConfig, key: Array) -> Params:
    pure = lambda module: nnx.to_pure_dict(nnx.split(module)[1])
    stem_key, layer_key, delta_key = jax.random.split(key, 3)
    params = pure(Stem(cfg, rngs=nnx.Rngs(stem_key)))
    plain = MemorySpec("softmax_cache")
    make = lambda key: pure(TransformerLayer(cfg, plain, rngs=nnx.Rngs(key)))
    layers = _unstack(jax.vmap(make)(jax.random.split(layer_key, cfg.num_layers)))
    keys = jax.random.split(delta_key, cfg.num_layers)
    for spec in {cfg.memory_of(i): None for i in range(cfg.num_layers)}:
        added = _unstack(jax.vmap(functools.partial(_init_additions, cfg, spec))(keys))
        for i, node in enumerate(added):
            if cfg.memory_of(i) == spec:
                layers[i] |= node
    return params | {"blocks": {str(i): layer for i, layer in enumerate(layers)}}


def _init_additions(cfg: ModelConfig, spec: MemorySpec, key: Array) -> Params:
    """What a memory adds to the public tree of a layer."""
    memory, updates = additions(cfg, spec, rngs=nnx.Rngs(key))
    modules = {"memory": memory} | ({} if updates is None else {"ffn_updates": updates})
    made = {name: nnx.to_pure_dict(nnx.split(module)[1]) for name, module in modules.items()}
    return to_public({name: node for name, node in made.items() if node})


def _unstack(tree: Params) -> list[Params]:
    leaves = jax.tree.leaves(tree)
    count = len(leaves[0]) if leaves else 0
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(count)]


def param_shapes(cfg: ModelConfig) -> Params:
    """Shapes and dtypes of `init_params`, without making any array."""
    return jax.eval_shape(functools.partial(init_params, cfg), jax.random.key(0))


def without_delta(params: Params) -> Params:
    """The teacher's parameters: those of a hybrid less everything that conversion adds."""
    return params | {"blocks": {i: base_of(layer) for i, layer in params["blocks"].items()}}


def teacher_params(params: Params, cfg: ModelConfig) -> Params:
    """The parameters of `cfg.teacher()` among those of a model."""
    return without_delta(params) if cfg.converted_layers else params


def base_of(layer: Params) -> Params:
    """A layer's parameters less everything that conversion adds."""
    return {name: node for name, node in layer.items() if name != ADDED}


def stack_params(params: Params | StackedParams, cfg: ModelConfig) -> StackedParams:
    """Stacks runs of equal layers and casts weight matrices to the compute dtype.

    Stacked parameters are returned as they are, so that a caller may stack once for many calls.
    """
    if isinstance(params, StackedParams):
        return params
    params = cast_params(params, cfg)
    layers = params["blocks"]
    runs = tuple(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *(layers[str(i)] for i in range(*run)))
        for run in cfg.layer_runs()
    )
    return StackedParams({name: node for name, node in params.items() if name != "blocks"}, runs)


def cast_params(params: Params, cfg: ModelConfig) -> Params:
    """Casts weight matrices to the compute dtype; small parameters stay as they are."""
    cast = functools.partial(_cast, dtype=jnp.dtype(cfg.dtype))
    return jax.tree_util.tree_map_with_path(cast, params)


def compute_shapes(cfg: ModelConfig) -> Params:
    """Shapes and dtypes of the parameters as they are computed with."""
    return jax.eval_shape(functools.partial(cast_params, cfg=cfg), param_shapes(cfg))


def _cast(path, leaf, dtype):
    name = "/".join(str(entry.key) for entry in path)
    return leaf if facts_of(name).keep_float32 else leaf.astype(dtype)
