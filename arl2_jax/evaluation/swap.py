"""How far a model's prediction changes when only one of its layers is hybrid."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from arl2_jax.config import ModelConfig, SamplerConfig
from arl2_jax.evaluation.gap import Batch, Model, flow_errors
from arl2_jax.models import (
    Params,
    base_of,
    compute_params,
    stacked_runs,
    stem_of,
    without_delta,
)
from arl2_jax.models.wan import make_layer, make_stem
from arl2_jax.training.losses import NoisedClip, embed_noised


def swap_errors(
    params: Params, cfg: ModelConfig, clips: Batch, sampler: SamplerConfig, key: Array
) -> list[float]:
    """Compute the relative squared error of x0 with each layer swapped alone, by index.

    The measure is `arl2_jax.evaluation.gap.teacher_error`. One compilation serves all layers.

    Args:
      params, cfg: the model with all layers hybrid.
      clips, sampler, key: as in `teacher_error`.
    """
    teacher = Model(without_delta(params), cfg.teacher())
    flows = {
        str(layer): functools.partial(_swapped_flow, params, cfg, jnp.int32(layer))
        for layer in range(cfg.num_layers)
    }
    errors = flow_errors(flows, teacher, clips, sampler, key)
    return [errors[str(layer)].mean for layer in range(cfg.num_layers)]


def swapped_flow(
    params: Params, cfg: ModelConfig, layer: Int[Array, ""], clip: NoisedClip
) -> Float[Array, "b t rows columns channels"]:
    """Predict the flow of a clip with one hybrid layer; all others are the teacher's.

    It equals `apply_clip` of the model with this one hybrid layer. The layer may be traced.

    Args:
      params, cfg: the model with all layers hybrid.
      layer: index of the hybrid layer.
      clip: the noised clip.

    Raises:
      ValueError: some layers of cfg are not hybrid.
    """
    if len(cfg.converted_layers) < cfg.num_layers:
        raise ValueError(f"hybrid_layers={cfg.hybrid_layers} must be all {cfg.num_layers} layers")
    params = compute_params(params, cfg)
    stem = make_stem(cfg, stem_of(params))
    ((_, _, layers),) = stacked_runs(params)
    tokens = embed_noised(stem, cfg, clip)
    blocks = clip.clean.shape[1] // cfg.frames_per_block

    def pass_through(cfg: ModelConfig, weights: Params, x: Array) -> Array:
        module = make_layer(cfg, 0, weights)
        context = module.cross_attn.encode(tokens.text)
        return module.clip(x, tokens.conditions, context, blocks, copies=2)[0]

    hybrid = functools.partial(pass_through, cfg)
    softmax = lambda weights, x: pass_through(cfg.teacher(), base_of(weights), x)

    def step(x, weights_and_index):
        weights, index = weights_and_index
        return jax.lax.cond(index == layer, hybrid, softmax, weights, x), None

    x, _ = jax.lax.scan(step, tokens.x, (layers, jnp.arange(cfg.num_layers)))
    noisy = x.reshape(-1, 2, *x.shape[1:])[:, 1]
    return stem.predict_flow(noisy, tokens.time, *clip.clean.shape[2:4])


_swapped_flow = jax.jit(swapped_flow, static_argnums=1)
