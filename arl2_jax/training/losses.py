"""Losses of each phase, as functions of parameters and a noised clip."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arl2_jax.config import ModelConfig, SamplerConfig
from arl2_jax.diffusion import add_noise, draw_levels, draw_noise, per_frame
from arl2_jax.models import (
    ADDED,
    Params,
    apply_clip,
    base_of,
    cast_params,
    run_name,
    runs_of,
    stack_params,
    stacked_runs,
    stem_of,
    without_delta,
)
from arl2_jax.models.embeddings import Stem
from arl2_jax.models.wan import Clip, embed_clip, make_layer, make_stem, noisy_half


class NoisedClip(NamedTuple):
    """A clip and its noised copy.

    Attributes:
      clean: latents [B, T, rows, columns, channels].
      noisy: the same latents at noise level s.
      eps: the noise in it.
      s: noise levels, [B, T].
      text: text embeddings, [B, L, text_dim].
      noised_context: the latents written to the memories, at noise level context_s; None if they
        are written clean.
      context_s: noise levels of the written latents, [B, T]; None if they are 0.
    """

    clean: Float[Array, "b t rows columns channels"]
    noisy: Float[Array, "b t rows columns channels"]
    eps: Float[Array, "b t rows columns channels"]
    s: Float[Array, "b t"]
    text: Float[Array, "b l text_dim"]
    noised_context: Float[Array, "b t rows columns channels"] | None = None
    context_s: Float[Array, "b t"] | None = None

    @property
    def timestep(self) -> Float[Array, "b t"]:
        """Return noise levels as the network reads them, in 0..1000."""
        return 1000 * self.s

    @property
    def context(self) -> Float[Array, "b t rows columns channels"]:
        """Return the latents written to the memories, the blocks' past."""
        return self.clean if self.noised_context is None else self.noised_context

    @property
    def context_timestep(self) -> Float[Array, "b t"] | None:
        """Return the noise levels of `context` as the network reads them; None if they are 0."""
        return None if self.context_s is None else 1000 * self.context_s


def noise_clip(key: Array, cfg: ModelConfig, latents, text, sampler: SamplerConfig) -> NoisedClip:
    """Noise each block of a clip to a random level, and its past to sampler.context_noise.

    Args:
      key: random key. The `noisy` copy does not depend on the level of the past.
      cfg: model, for the frames of a block.
      latents: clean latents [B, T, rows, columns, channels].
      text: text embeddings.
      sampler: gives the shift of the levels, and the level at which the past is written.
    """
    level_key, noise_key = jax.random.split(key)
    blocks = latents.shape[1] // cfg.frames_per_block
    s = draw_levels(level_key, latents.shape[0], blocks, cfg.frames_per_block, sampler.shift)
    eps = draw_noise(noise_key, latents.shape)
    clip = NoisedClip(latents, add_noise(latents, eps, s), eps, s, text)
    if sampler.context_noise == 0:
        return clip
    context_s = jnp.full_like(s, sampler.context_noise)
    context_eps = draw_noise(jax.random.fold_in(noise_key, 1), latents.shape)
    return clip._replace(
        noised_context=add_noise(latents, context_eps, context_s), context_s=context_s
    )


def predict(params: Params, cfg: ModelConfig, clip: NoisedClip):
    """Predict the flow of all noisy blocks: (flow, diagnostics of the layers)."""
    return apply_clip(
        params, cfg, clip.context, clip.noisy, clip.timestep, clip.text, clip.context_timestep
    )


def embed_noised(stem: Stem, cfg: ModelConfig, clip: NoisedClip) -> Clip:
    """Embed both copies of a clip, as the network of `predict` does."""
    return embed_clip(
        stem, cfg, clip.context, clip.noisy, clip.timestep, clip.text, clip.context_timestep
    )


def flow_matching(params: Params, cfg: ModelConfig, clip: NoisedClip):
    """Compute the mean squared error of the flow against eps - x0: (loss, diagnostics)."""
    flow, diagnostics = predict(params, cfg, clip)
    return jnp.mean(jnp.square(flow - (clip.eps - clip.clean))), diagnostics


def distillation(params: Params, cfg: ModelConfig, clip: NoisedClip, teacher_flow):
    """Compute the mean squared errors of flow and x0 against the teacher: (loss, diagnostics).

    At the same noisy input the two errors differ only by the noise level: dx0 = -s dv.
    """
    flow, diagnostics = predict(params, cfg, clip)
    error = jnp.square(flow - teacher_flow)
    return jnp.mean(error * (1 + per_frame(clip.s) ** 2)), diagnostics


def teacher_flow(params: Params, cfg: ModelConfig, clip: NoisedClip):
    """Predict the flow of the softmax model whose weights a hybrid contains."""
    return jax.lax.stop_gradient(predict(without_delta(params), cfg.teacher(), clip)[0])


class LayerDistillation(NamedTuple):
    """Errors of the converted layers' attention and their gradients.

    Attributes:
      gradients: of every layer's error with respect to its additions, stacked like them:
        {"blocks": {"0-21": {"delta": ...}}}.
      diagnostics: per run of equal layers, as in `apply_clip`; of converted layers also "error",
        relative to the teacher's mean square.
      teacher_flow: what `teacher_flow` returns; the scan has run all of the teacher's layers.
    """

    gradients: Params
    diagnostics: tuple[dict[str, Array], ...]
    teacher_flow: Float[Array, "b t rows columns channels"]

    @property
    def errors(self) -> dict[str, Array]:
        """Return the error of each converted layer; layer index -> scalar."""
        runs = runs_of(self.gradients)
        return {
            str(i): values[i - start]
            for (start, stop), values in zip(runs, self._by_run(), strict=True)
            for i in range(start, stop)
        }

    @property
    def mean_error(self) -> Array:
        """Return the mean error of the converted layers."""
        return jnp.mean(jnp.concatenate(self._by_run()))

    def _by_run(self) -> list[Array]:
        return [logged["error"] for logged in self.diagnostics if "error" in logged]


def distill_layers(params: Params, cfg: ModelConfig, clip: NoisedClip) -> LayerDistillation:
    """Distill the softmax attention of each converted layer (stage 1; ARL2, section 3).

    Each layer gets the teacher's own input, so that errors do not accumulate, and is compared
    after Wo. The gradient is taken inside the scan over layers, so only one layer's activations
    are alive at a time, however deep the model.
    """
    teacher, params = cfg.teacher(), stack_params(params, cfg)
    stem = make_stem(cfg, cast_params(stem_of(params), cfg))
    tokens = embed_noised(stem, cfg, clip)
    blocks = clip.clean.shape[1] // cfg.frames_per_block
    x, gradients, diagnostics = tokens.x, {}, []
    for start, stop, weights in stacked_runs(params):
        converted = start in cfg.converted_layers

        def step(x, weights, start=start, converted=converted):
            base = cast_params(base_of(weights), cfg)
            layer = make_layer(teacher, start, base)
            h = layer.attention_input(x, tokens.conditions)
            target, _ = layer.attend_clip(h, tokens.conditions, blocks, copies=2)
            context = layer.cross_attn.encode(tokens.text)
            finished = layer.finish(x, target, tokens.conditions, context)
            if not converted:
                return finished, None

            def error(added):
                student = make_layer(cfg, start, base | cast_params({ADDED: added}, cfg))
                out, logged = student.attend_clip(h, tokens.conditions, blocks, copies=2)
                pairs = (x.reshape(-1, 2, *x.shape[1:]) for x in (out, target))
                return relative_error(*pairs), logged

            value, gradient = jax.value_and_grad(error, has_aux=True)(weights[ADDED])
            return finished, (value, gradient)

        x, per_layer = jax.lax.scan(step, x, weights)
        if per_layer is None:
            diagnostics.append({})
            continue
        (values, logged), gradient = per_layer
        diagnostics.append(logged | {"error": values})
        gradients[run_name(start, stop)] = {ADDED: gradient}
    flow = stem.predict_flow(noisy_half(x), tokens.time, *clip.clean.shape[2:4])
    flow = jax.lax.stop_gradient(flow)
    return LayerDistillation({"blocks": gradients}, tuple(diagnostics), flow)


def relative_error(x: Float[Array, "b ..."], target: Float[Array, "b ..."]) -> Array:
    """Compute the mean square of x - target relative to that of target.

    The ratio is taken per clip and then averaged, so that the mean over micro-batches is the mean
    over the batch.
    """
    x, target = x.astype(jnp.float32), target.astype(jnp.float32)
    mean = lambda y: jnp.mean(jnp.square(y), axis=tuple(range(1, y.ndim)))
    return jnp.mean(mean(x - target) / (mean(target) + 1e-12))
