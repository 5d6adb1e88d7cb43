"""The causal Wan network as functions of parameters, in block form and in clip form.

Neighbouring layers of one kind are stacked and scanned, so that compile time does not grow with
depth.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from arl2_jax.config import MemorySpec, ModelConfig
from arl2_jax.models.attention import TextContext
from arl2_jax.models.embeddings import Stem
from arl2_jax.models.layer import Conditions, Params, TransformerLayer, from_public
from arl2_jax.models.memories import memory_of
from arl2_jax.models.params import compute_params, runs_of, stacked_runs, stem_of
from arl2_jax.nn.positions import TokenGrid, video_grid
from pallas_kernels import save_attention


@functools.lru_cache
def layer_graph(cfg: ModelConfig, spec: MemorySpec) -> nnx.GraphDef:
    """Return the graph of a layer, to be merged with its parameters."""
    abstract = nnx.eval_shape(lambda: TransformerLayer(cfg, spec, rngs=nnx.Rngs(0)))
    return nnx.split(abstract)[0]


@functools.lru_cache
def stem_graph(cfg: ModelConfig) -> nnx.GraphDef:
    """Return the graph of everything outside the layers."""
    return nnx.split(nnx.eval_shape(lambda: Stem(cfg, rngs=nnx.Rngs(0))))[0]


def make_layer(cfg: ModelConfig, layer: int | MemorySpec, params: Params) -> TransformerLayer:
    """Make a layer around its parameters: one of the model by its index, or with another memory."""
    spec = cfg.memory_of(layer) if isinstance(layer, int) else layer
    return nnx.merge(layer_graph(cfg, spec), from_public(params))


def make_stem(cfg: ModelConfig, params: Params) -> Stem:
    """Make the parts outside the layers around their parameters."""
    return nnx.merge(stem_graph(cfg), params)


def encode_text(
    params: Params, cfg: ModelConfig, text: Float[Array, "b l text_dim"]
) -> tuple[TextContext, ...]:
    """Compute keys and values of a prompt for all layers, one stacked tree per run."""
    params = compute_params(params, cfg)
    stem = make_stem(cfg, stem_of(params))
    embedded = stem.text_embedding(text)
    contexts = []
    for start, _, run in stacked_runs(params):
        encode = lambda layer, start=start: make_layer(cfg, start, layer).cross_attn.encode(
            embedded
        )
        contexts.append(jax.lax.map(encode, run))
    return tuple(contexts)


def apply(
    params: Params,
    cfg: ModelConfig,
    latents: Float[Array, "b f rows columns channels"],
    timestep: Float[Array, "b f"],
    text: Float[Array, "b l text_dim"] | tuple[TextContext, ...],
    *,
    memory: tuple,
    position: int | Int[Array, ""] = 0,
    write: bool = False,
    read: tuple | None = None,
) -> tuple[Float[Array, "b f rows columns out_channels"], tuple]:
    """Apply the network to one frame block.

    Args:
      params: parameters in either form (`arl2_jax.models.params`).
      cfg: model.
      latents: one frame block, channels last.
      timestep: noise level of each frame in 0..1000.
      text: text embeddings with zeros past the prompt, or their keys and values from `encode_text`.
      memory: memories of all layers, from `init_memory` or an earlier call.
      position: index of the block's first latent frame, may be traced.
      write: whether the block is finished and to be remembered.
      read: memories that the block sees instead of `memory`, which is still the one written to.

    Returns:
      The flow (float32, like latents), and the memory, which is new only if `write`.

    Raises:
      ValueError: the block's shape does not fit the model or the memory.
    """
    return apply_pass(
        params, cfg, latents, timestep, text,
        memory=memory, position=position, write=write, read=read,
    )[:2]  # fmt: skip


def apply_pass(
    params: Params,
    cfg: ModelConfig,
    latents: Float[Array, "b f rows columns channels"],
    timestep: Float[Array, "b f"],
    text: Float[Array, "b l text_dim"] | tuple[TextContext, ...],
    *,
    memory: tuple,
    position: int | Int[Array, ""] = 0,
    write: bool = False,
    read: tuple | None = None,
    aux: tuple | None = None,
) -> tuple[Float[Array, "b f rows columns out_channels"], tuple, tuple]:
    """Run `apply` as one of several passes over a block, for memories that gather aux in each pass.

    Args:
      params, cfg, latents, timestep, text, memory, position, write, read: as in `apply`.
      aux: the aux that the previous pass over the block returned; None in the first pass.

    Returns:
      The flow and the memory as in `apply`; and aux, the sum over the passes so far, one tree per
      run of equal layers.
    """
    rows, columns = check_latents(cfg, latents, timestep)
    params = compute_params(params, cfg)
    stem = make_stem(cfg, stem_of(params))
    contexts = text if isinstance(text, tuple) else encode_text(params, cfg, text)
    x = stem.embed_patches(latents)
    time, modulation = stem.embed_time(timestep)
    grid = video_grid(position, latents.shape[1], rows, columns, cfg.head_dim)
    conditions = Conditions(modulation, grid)

    none = (None,) * len(memory)
    seen_memory = memory if read is None else read
    new_memory, gathered = [], []
    for (start, _, weights), context, state, seen, aux_of_run in zip(
        stacked_runs(params), contexts, memory, seen_memory, aux or none, strict=True
    ):
        run = _pass_stacked if memory_of(cfg, start).stacked else _pass_sliced
        x, state, aux_of_run = run(
            cfg, start, conditions, write, x, weights, context, state, seen, aux_of_run
        )
        new_memory.append(state)
        gathered.append(aux_of_run)
    flow = stem.predict_flow(x, time, latents.shape[2], latents.shape[3])
    if not write:
        return flow, memory, tuple(gathered)
    starts = [start for start, _ in runs_of(params)]
    return flow, _after_block(cfg, starts, new_memory, grid), tuple(gathered)


def _pass_sliced(cfg, start, conditions, write, x, weights, context, state, seen, aux):
    """Pass through a run of equal layers, each with its slice of the state."""

    def step(x, layer):
        weights, context, state, seen, aux = layer
        x, state, aux = make_layer(cfg, start, weights).block(
            x, conditions, context, state, aux, write=write, read=seen
        )
        return x, (state if write else None, aux)

    x, (written, aux) = jax.lax.scan(step, x, (weights, context, state, seen, aux))
    return x, written if write else state, aux


def _pass_stacked(cfg, start, conditions, write, x, weights, context, state, seen, aux):
    """Pass through a run of equal layers without copying its stacked state.

    The layers read the state in place. Their entries are written together after the last layer.
    """

    def step(x, layer):
        weights, context, aux, index = layer
        x, entries, aux = make_layer(cfg, start, weights).block(
            x, conditions, context, state, aux, write=write, read=seen, layer=index
        )
        return x, (entries if write else None, aux)

    indices = jnp.arange(len(jax.tree.leaves(weights)[0]), dtype=jnp.int32)
    x, (entries, aux) = jax.lax.scan(step, x, (weights, context, aux, indices))
    if write:
        state = memory_of(cfg, start).put(entries, state, conditions.grid)
    return x, state, aux


def _after_block(cfg: ModelConfig, starts: list[int], memory: list, grid: TokenGrid) -> tuple:
    """Apply `after_block` of each kind of memory, for all layers of the kind together.

    Args:
      cfg: model.
      starts: the first layer of each run.
      memory: states of the runs.
      grid: positions of the block's tokens.
    """
    runs: dict[str, list[int]] = {}
    for i, start in enumerate(starts):
        runs.setdefault(cfg.memory_of(start).kind, []).append(i)
    for indices in runs.values():
        decide = getattr(memory_of(cfg, starts[indices[0]]), "after_block", None)
        if decide is None:
            continue
        for i, state in zip(indices, decide([memory[i] for i in indices], grid), strict=True):
            memory[i] = state
    return tuple(memory)


class Clip(NamedTuple):
    """An embedded clip: a clean copy and next to it, in the batch, a noisy one.

    Attributes:
      x: tokens [2 B, T N, C].
      conditions: conditions of both copies.
      text: embedded text [B, L, C].
      time: time embedding of the noisy copy, [B, T, C].
    """

    x: Float[Array, "both n c"]
    conditions: Conditions
    text: Float[Array, "b l c"]
    time: Float[Array, "b t c"]


def embed_clip(
    stem: Stem, cfg: ModelConfig, clean, noisy, timestep, text, context_timestep=None
) -> Clip:
    """Embed both copies of a clip; arguments as in `apply_clip`."""
    if context_timestep is None:
        context_timestep = jnp.zeros_like(timestep)
    check_latents(cfg, clean, context_timestep)
    rows, columns = check_latents(cfg, noisy, timestep)
    both = lambda clean, noisy: jnp.stack([clean, noisy], 1).reshape(-1, *noisy.shape[1:])
    x = stem.embed_patches(both(clean, noisy))
    time, modulation = stem.embed_time(both(context_timestep, timestep))
    grid = video_grid(0, noisy.shape[1], rows, columns, cfg.head_dim)
    return Clip(x, Conditions(modulation, grid), stem.text_embedding(text), noisy_half(time))


def noisy_half(x: Float[Array, "_ ..."]) -> Float[Array, "b ..."]:
    """Return the noisy copy of each pair."""
    return x.reshape(-1, 2, *x.shape[1:])[:, 1]


def apply_clip(
    params: Params,
    cfg: ModelConfig,
    clean: Float[Array, "b t rows columns channels"],
    noisy: Float[Array, "b t rows columns channels"],
    timestep: Float[Array, "b t"],
    text: Float[Array, "b l text_dim"],
    context_timestep: Float[Array, "b t"] | None = None,
) -> tuple[Float[Array, "b t rows columns out_channels"], tuple[dict[str, Array], ...]]:
    """Apply the network to all blocks of a clip at once, for training (teacher forcing).

    Noisy block i sees clean blocks before i and itself: what `apply` sees block by block when it
    writes every clean block.

    Args:
      params, cfg: as in `apply`.
      clean: the clip's latents to be remembered, T a multiple of cfg.frames_per_block.
      noisy: the same clip, noised.
      timestep: noise level of each noisy frame in 0..1000, equal within a block.
      text: text embeddings.
      context_timestep: noise level of each frame of `clean`; by default 0.

    Returns:
      The flow of the noisy copy (float32), and per run of equal layers a dict of diagnostics, each
      [layers of the run].

    Raises:
      ValueError: a shape does not fit the model.
    """
    params = compute_params(params, cfg)
    stem = make_stem(cfg, stem_of(params))
    clip = embed_clip(stem, cfg, clean, noisy, timestep, text, context_timestep)
    blocks = clean.shape[1] // cfg.frames_per_block
    x, diagnostics = clip.x, []
    for start, _, weights in stacked_runs(params):

        def step(x, weights, start=start):
            layer = make_layer(cfg, start, weights)
            context = layer.cross_attn.encode(clip.text)
            return layer.clip(x, clip.conditions, context, blocks, copies=2)

        x, logged = jax.lax.scan(rematerialize(step, cfg), x, weights)
        diagnostics.append(logged)
    flow = stem.predict_flow(noisy_half(x), clip.time, *clean.shape[2:4])
    return flow, tuple(diagnostics)


def rematerialize(step: Callable, cfg: ModelConfig) -> Callable:
    """Apply cfg.remat to the body of a scan over layers."""
    if cfg.remat == "none":
        return step
    policies: dict[str, Any] = {
        "attention": save_attention,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "layer": None,
    }
    # Inside a scan the compiler cannot undo it by CSE, so the barrier is not needed.
    return jax.checkpoint(step, policy=policies[cfg.remat], prevent_cse=False)


def check_latents(cfg: ModelConfig, latents, timestep) -> tuple[int, int]:
    """Check latents and timestep; return rows and columns of the token grid."""
    if latents.ndim != 5 or latents.shape[-1] != cfg.in_dim:
        raise ValueError(
            f"latents have shape {latents.shape}; the model takes [batch, frames, rows, columns, "
            f"{cfg.in_dim}]"
        )
    if latents.shape[1] % cfg.frames_per_block:
        raise ValueError(
            f"latents have {latents.shape[1]} frames, not a multiple of "
            f"frames_per_block={cfg.frames_per_block}"
        )
    _, ph, pw = cfg.patch_size
    if latents.shape[2] % ph or latents.shape[3] % pw:
        raise ValueError(
            f"latents have {latents.shape[2]} x {latents.shape[3]} rows and columns, not multiples "
            f"of the patch {ph} x {pw}; crop or pad them"
        )
    if timestep.shape != latents.shape[:2]:
        raise ValueError(
            f"timestep has shape {timestep.shape}; must be one per frame: {latents.shape[:2]}"
        )
    return latents.shape[2] // ph, latents.shape[3] // pw
