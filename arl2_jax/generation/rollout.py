"""Generation block by block, as one scan: denoise a block, then write it to the memories."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from arl2_jax import models
from arl2_jax.config import ModelConfig, SamplerConfig
from arl2_jax.diffusion import add_noise, draw_noise, sample_carrying


class RolloutState(NamedTuple):
    """State carried from block to block.

    Attributes:
      memory: memories of all layers; with guidance, for the batch with and without text.
      position: index of the next latent frame, int32.
      key: random key.
    """

    memory: Any
    position: Int[Array, ""]
    key: Array


class RolloutContext(NamedTuple):
    """Constants of a rollout: parameters of `models.compute_params`, and the encoded text."""

    params: models.Params
    text: tuple


def init_rollout(
    params,
    cfg: ModelConfig,
    sampler: SamplerConfig,
    text,
    key,
    *,
    frames,
    tokens_per_frame,
    null_text=None,
) -> tuple[RolloutContext, RolloutState]:
    """Return the constants and the first state of a rollout, in the model's first phase.

    Args:
      params, cfg: the model.
      sampler: with guidance above 1, the batch is doubled by a copy with `null_text`.
      text: text embeddings [B, L, text_dim].
      key: random key.
      frames: latent frames of the whole video; None for an endless one, see
        `arl2_jax.init_memory`.
      tokens_per_frame: tokens of a latent frame.
      null_text: embedding [L, text_dim] that guidance leads away from: of the empty or of a
        negative prompt. By default zeros, to which training drops the text.
    """
    if sampler.guidance > 1:
        null = jnp.zeros_like(text) if null_text is None else null_text
        text = jnp.concatenate([text, jnp.broadcast_to(null, text.shape).astype(text.dtype)])
    params = models.compute_params(params, cfg)
    context = RolloutContext(params, models.encode_text(params, cfg, text))
    memory = models.init_memory(
        cfg,
        batch=text.shape[0],
        frames=frames,
        tokens_per_frame=tokens_per_frame,
        runs=models.runs_of(params),
    )
    return context, RolloutState(memory, jnp.int32(0), key)


def enter_phase(
    context: RolloutContext,
    before: ModelConfig,
    after: ModelConfig,
    state: RolloutState,
    *,
    frames: int | None,
    tokens_per_frame: int,
) -> RolloutState:
    """Convert the memories from one phase of generation to the next, see `ModelConfig.phases`.

    Args:
      context, state: the rollout, at the latent frame at which the phase begins.
      before, after: models of both phases.
      frames, tokens_per_frame: as in `init_rollout`.
    """
    memory = models.hand_over(
        before,
        after,
        state.memory,
        frames=frames,
        tokens_per_frame=tokens_per_frame,
        runs=models.runs_of(context.params),
    )
    return state._replace(memory=memory)


def write_block(
    context: RolloutContext,
    cfg: ModelConfig,
    sampler: SamplerConfig,
    state: RolloutState,
    block: Float[Array, "b f rows columns channels"],
    *,
    read=None,
    eps: Float[Array, "b f rows columns channels"] | None = None,
    aux: Any = None,
) -> RolloutState:
    """Write a block to the memories, at noise level sampler.context_noise.

    Args:
      context, cfg, sampler, state: the rollout; its key is split only at levels above 0.
      block: clean latents [B, f, rows, columns, channels].
      read: memories that the block reads instead of those of `state`, to which it is written.
      eps: noise for the block, standard normal; by default drawn with the key of `state`.
      aux: what the memories gathered while the block was denoised; None if it was not.
    """
    level = jnp.full(block.shape[:2], sampler.context_noise, jnp.float32)
    if sampler.context_noise > 0:
        if eps is None:
            key, own = jax.random.split(state.key)
            state, eps = state._replace(key=key), draw_noise(own, block.shape)
        block = add_noise(block, eps, level)
    # With guidance, the same block is written with and without text.
    copies = context.text[0].k.shape[1] // block.shape[0]
    _, memory, _ = models.apply_pass(
        context.params,
        cfg,
        jnp.tile(block, (copies, 1, 1, 1, 1)),
        jnp.tile(1000 * level, (copies, 1)),
        context.text,
        memory=state.memory,
        position=state.position,
        write=True,
        read=read,
        aux=aux,
    )
    return state._replace(memory=memory, position=state.position + block.shape[1])


def denoise_block(
    context: RolloutContext,
    cfg: ModelConfig,
    sampler: SamplerConfig,
    state: RolloutState,
    shape: tuple[int, ...],
) -> tuple[RolloutState, Float[Array, "b f rows columns channels"]]:
    """Generate the next block, of the given shape, from noise, without writing it."""
    return _denoise_block(context, cfg, sampler, state, shape)[:2]


def _denoise_block(context: RolloutContext, cfg, sampler, state: RolloutState, shape):
    """Do as `denoise_block`; also return what the memories gathered."""
    key, block_key = jax.random.split(state.key)

    def flow_fn(x, s, aux):
        guided = sampler.guidance > 1
        latents = jnp.concatenate([x, x]) if guided else x
        timestep = jnp.full(latents.shape[:2], 1000 * s)
        flow, _, aux = models.apply_pass(
            context.params,
            cfg,
            latents,
            timestep,
            context.text,
            memory=state.memory,
            position=state.position,
            aux=aux,
        )
        if not guided:
            return flow, aux
        with_text, without = jnp.split(flow, 2)
        return without + sampler.guidance * (with_text - without), aux

    aux: Any = (None,) * len(state.memory)
    if models.gathers(cfg):
        # The passes are a scan that carries aux, so its shape must be known before the first.
        shapes = jax.eval_shape(lambda: flow_fn(jnp.zeros(shape), jnp.float32(1), None)[1])
        aux = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    block, aux = sample_carrying(flow_fn, aux, block_key, shape, sampler)
    return state._replace(key=key), block, aux


def generate_block(
    context: RolloutContext,
    cfg: ModelConfig,
    sampler: SamplerConfig,
    state: RolloutState,
    shape: tuple[int, ...],
) -> tuple[RolloutState, Float[Array, "b f rows columns channels"]]:
    """Denoise the next block and write it to the memories."""
    state, block, aux = _denoise_block(context, cfg, sampler, state, shape)
    return write_block(context, cfg, sampler, state, block, aux=aux), block


@functools.partial(jax.jit, static_argnames=("cfg", "sampler", "blocks", "shape"))
def rollout(
    params,
    cfg: ModelConfig,
    sampler: SamplerConfig,
    text: Float[Array, "b l text_dim"],
    key: Array,
    *,
    blocks: int,
    shape: tuple[int, int, int],
    past: Float[Array, "b past rows columns channels"] | None = None,
) -> Float[Array, "b t rows columns channels"]:
    """Generate a video, or continue one.

    Args:
      params, cfg: the model.
      sampler: how each block is denoised and written.
      text: text embeddings.
      key: random key.
      blocks: frame blocks to generate.
      shape: rows, columns and channels of a latent frame.
      past: clean latents to continue, whole blocks; they are written to the memories first.

    Returns:
      Only the generated blocks, [B, blocks * f, rows, columns, channels] float32.
    """
    f, past_frames = cfg.frames_per_block, 0 if past is None else past.shape[1]
    frames = past_frames + blocks * f
    tokens = shape[0] * shape[1] // (cfg.patch_size[1] * cfg.patch_size[2])
    room = dict(frames=frames, tokens_per_frame=tokens)
    context, state = init_rollout(params, cfg, sampler, text, key, **room)
    phases = [phase for phase in cfg.phases() if phase[0] < frames]
    ends, before, made = [*(first for first, _ in phases[1:]), frames], cfg, []
    for (first, model), end in zip(phases, ends, strict=True):
        if first:
            state = enter_phase(context, before, model, state, **room)
        known = min(max(first, past_frames), end)
        if past is not None and first < known:
            state = _remember(context, model, sampler, state, past[:, first:known])
        block_shape = (text.shape[0], f, *shape)
        generate = functools.partial(_generate_next, context, model, sampler, block_shape)
        state, video = jax.lax.scan(generate, state, length=(end - known) // f)
        made.append(rearrange(video, "m b f ... -> b (m f) ..."))
        before = model
    return jnp.concatenate(made, axis=1)


def _remember(context: RolloutContext, cfg, sampler, state: RolloutState, past) -> RolloutState:
    """Write whole blocks to the memories, one after the other."""
    blocks = rearrange(past, "b (m f) ... -> m b f ...", f=cfg.frames_per_block)
    step = lambda state, block: (write_block(context, cfg, sampler, state, block), None)
    return jax.lax.scan(step, state, blocks)[0]


def _generate_next(context: RolloutContext, cfg, sampler, shape, state: RolloutState, _):
    return generate_block(context, cfg, sampler, state, shape)
