"""One optimizer step, the same for every phase."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from arl2_jax.config import Config
from arl2_jax.generation.rollout import rollout
from arl2_jax.memory.initial import value_scale
from arl2_jax.models import Params, run_name
from arl2_jax.training import losses
from arl2_jax.training.losses import NoisedClip
from arl2_jax.training.optimizer import learning_rate, make_optimizer
from arl2_jax.training.partition import merge_params

Metrics = dict[str, Array]


class TrainState(NamedTuple):
    """State of a phase, as checkpoints store it.

    Attributes:
      step: finished optimizer steps, int32.
      params: trained parameters, float32 and stacked, a nested dict.
      opt_state: state of the optimizer.
      ema: averaged copy of params.
      key: random key of the next step.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params
    key: Array


def init_state(config: Config, phase: str, trained: Params, key: Array) -> TrainState:
    """Return the state before the first step; it shares no buffer, so a step may donate it."""
    optimizer = _optimizer(config, phase, trained)
    copy = lambda: jax.tree.map(jnp.copy, trained)
    return TrainState(jnp.int32(0), copy(), optimizer.init(trained), copy(), key)


def make_step(config: Config, phase: str, *, self_rollout: bool = False) -> Callable:
    """Return the step of a phase: (state, frozen, batch) -> (state, metrics), to be jitted.

    Args:
      config: the run.
      phase: "teacher", "stage1" or "stage2".
      self_rollout: whether the clean past is the model's own generation instead of the data.
    """
    settings, schedule = getattr(config, phase), learning_rate(getattr(config, phase))
    gradients = _GRADIENTS[phase]

    def step(state: TrainState, frozen: Params, batch) -> tuple[TrainState, Metrics]:
        key, noise_key, text_key, rollout_key = jax.random.split(state.key, 4)
        latents, text = batch["latents"], batch["text"]
        if phase == "teacher":
            kept = jax.random.uniform(text_key, text.shape[:1]) >= config.teacher.text_dropout
            text = text * kept[:, None, None]
        if self_rollout:
            latents = _self_rollout(config, merge_params(state.params, frozen), text, rollout_key)
        clip = losses.noise_clip(noise_key, config.model, latents, text, config.sampler)
        one = lambda micro: gradients(config, state.params, frozen, micro)
        grads, metrics = accumulate(one, clip, settings.accumulation)
        optimizer = _optimizer(config, phase, state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = cast(Params, optax.apply_updates(state.params, updates))
        # EMA warm-up: a lower decay at first, so that the average forgets the initial values.
        decay = jnp.minimum(settings.ema_decay, (1 + state.step) / (10 + state.step))
        ema = cast(Params, optax.incremental_update(params, state.ema, 1 - decay))
        metrics |= {
            "gradient_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, opt_state, ema, key), metrics

    return step


def _optimizer(config: Config, phase: str, trained: Params):
    scale = value_scale(config.model.delta, config.model.attention)
    return make_optimizer(getattr(config, phase), trained, value_scale=scale)


def accumulate(gradients: Callable, clip: NoisedClip, parts: int):
    """Return the mean of gradients and metrics over micro-batches, in float32.

    A micro-batch takes every parts-th clip, so that no clip moves to another device.
    """
    if parts == 1:
        return gradients(clip)
    split = lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    micro = jax.tree.map(split, clip)
    first = jax.tree.map(lambda x: x[0], micro)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.float32), jax.eval_shape(gradients, first)
    )
    add = lambda total, part: (jax.tree.map(jnp.add, total, gradients(part)), None)
    total, _ = jax.lax.scan(add, zeros, micro)
    return jax.tree.map(lambda x: x / parts, total)


def _teacher_gradients(config: Config, trained: Params, frozen: Params, clip: NoisedClip):
    def loss(params):
        return losses.flow_matching(merge_params(params, frozen), config.model.teacher(), clip)[0]

    value, grads = jax.value_and_grad(loss)(trained)
    return grads, {"loss": value}


def _stage1_gradients(config: Config, trained: Params, frozen: Params, clip: NoisedClip):
    result = losses.distill_layers(merge_params(trained, frozen), config.model, clip)
    metrics = {"loss": result.mean_error} | _by_run(config, result.diagnostics)
    return select_trained(trained, result.gradients), metrics


def _stage2_gradients(config: Config, trained: Params, frozen: Params, clip: NoisedClip):
    params, weight = merge_params(trained, frozen), config.stage2.layer_loss
    if weight:
        local = losses.distill_layers(params, config.model, clip)
        target = local.teacher_flow
    else:
        local, target = None, losses.teacher_flow(params, config.model, clip)

    def loss(trained):
        return losses.distillation(merge_params(trained, frozen), config.model, clip, target)

    (value, diagnostics), grads = jax.value_and_grad(loss, has_aux=True)(trained)
    metrics = {"loss": value} | _by_run(config, diagnostics)
    if local is not None:
        add = lambda g, own: g + weight * own
        grads = jax.tree.map(add, grads, select_trained(trained, local.gradients))
        metrics["layer_error"] = local.mean_error
    return grads, metrics


_GRADIENTS = {
    "teacher": _teacher_gradients,
    "stage1": _stage1_gradients,
    "stage2": _stage2_gradients,
}


def select_trained(trained: Params, gradients: Params) -> Params:
    """Return those gradients of the layers' additions whose parameters are trained."""

    def pick(wanted, found):
        if not isinstance(wanted, dict):
            return found
        return {name: pick(node, found[name]) for name, node in wanted.items()}

    return pick(trained, gradients)


def _by_run(config: Config, diagnostics: tuple[dict[str, Array], ...]) -> Metrics:
    """Return the diagnostics of scanned runs, arrays over layers, under the names of metrics."""
    return {
        f"layers_{run_name(*run)}/{name}": values
        for run, logged in zip(config.model.layer_runs(), diagnostics, strict=True)
        for name, values in logged.items()
    }


def _self_rollout(config: Config, params: Params, text, key: Array):
    """Generate a clip with the student, without a past."""
    video = rollout(
        params,
        config.model,
        config.sampler,
        text,
        key,
        blocks=config.blocks,
        shape=config.latent_shape,
    )
    return jax.lax.stop_gradient(video)
