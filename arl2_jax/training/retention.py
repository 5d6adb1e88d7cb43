"""How much of the past a model's hybrid layers keep, with a warning for layers that keep none."""

import contextlib
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from arl2_jax.config import Config, MemorySpec, ModelConfig
from arl2_jax.data import ClipData
from arl2_jax.diffusion import add_noise
from arl2_jax.models import Params, cast_params, layer_of, stem_of
from arl2_jax.models.layer import Conditions
from arl2_jax.models.memories import memory_of
from arl2_jax.models.wan import Clip, embed_clip, make_layer, make_stem
from arl2_jax.sharding import BLOCKS, CLIPS, constrain
from arl2_jax.storage import write_whole

# A layer whose median head keeps less than this share of its state over a block has forgotten it.
FORGOTTEN = 1e-2

Measures = dict[str, Any]


def retention(
    params: Params, cfg: ModelConfig, clips: Mapping[str, Any], *, context_noise: float = 0.0
) -> Measures:
    """Measure how much each layer keeps, at its activations on clips.

    Layers whose memory has no such measure are left out. Clips go through the network one by one
    and layer by layer, as in the writing pass. Layers of a kind share one compilation.

    Args:
      params, cfg: the model; on a mesh, the work is sharded as in training.
      clips: "latents" [N, T, rows, columns, channels], T a multiple of cfg.frames_per_block, and
        "text" [N, L, text_dim].
      context_noise: noise level at which clips are written, see `SamplerConfig`. Every call draws
        the same noise, so that models can be compared.

    Returns:
      Lists of numbers, ready for JSON: "layers", their indices; "tokens_per_block"; "head_dim";
      "blocks_per_clip"; and per layer and head, [layers][heads], means over clips, all measures of
      `arl2_jax.memory.retention.measure_writes` and "read_to_local". "survival" has such a table
      for each lag, "1", "2", ..., in blocks. No layers where the memory is closed.
    """
    layers = measured_layers(cfg)
    _, frames, rows, columns, _ = clips["latents"].shape
    tokens = cfg.frames_per_block * (rows // cfg.patch_size[1]) * (columns // cfg.patch_size[2])
    facts: Measures = {
        "layers": list(layers),
        "tokens_per_block": tokens,
        "head_dim": cfg.head_dim,
        "blocks_per_clip": frames // cfg.frames_per_block,
    }
    if not layers:
        return facts | {"survival": {}}
    layout = jax.tree.leaves(params)[0].sharding if _on_devices(params) else None
    mesh = layout.mesh if isinstance(layout, NamedSharding) else None
    written = _as_written(clips, context_noise)
    # Kernels are sharded over this mesh.
    with jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext():
        found = _by_layer(params, cfg, written, context_noise, mesh)
    tables = {name: [[float(x) for x in row[name]] for row in found] for name in found[0]}
    lags = [name for name in tables if name.startswith("survival_")]
    survival = {name.removeprefix("survival_"): tables.pop(name) for name in lags}
    return facts | tables | {"survival": survival}


def measured_layers(cfg: ModelConfig) -> tuple[int, ...]:
    """Return the indices of the layers whose memory can be measured; none where it is closed."""
    if cfg.memory_gate == "zero":
        return ()
    return tuple(i for i in range(cfg.num_layers) if hasattr(memory_of(cfg, i), "measure"))


def _as_written(clips: Mapping[str, Any], level: float) -> Mapping[str, Any]:
    """Return the clips noised to a level; unchanged at 0."""
    if level == 0:
        return clips
    latents = np.asarray(clips["latents"])
    eps = np.random.default_rng(0).standard_normal(latents.shape, np.float32)
    s = jnp.full(latents.shape[:2], level)
    return {**clips, "latents": np.asarray(add_noise(latents, eps, s))}


def _by_layer(
    params: Params, cfg: ModelConfig, clips: Mapping[str, Any], level: float, mesh: Any
) -> list[dict[str, Float[np.ndarray, "h"]]]:
    """Return the measures of each hybrid layer, means over clips at a noise level."""
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    put = lambda x: jnp.asarray(x) if replicated is None else jax.device_put(x, replicated)
    stem = stem_of(params)
    blocks = clips["latents"].shape[1] // cfg.frames_per_block
    latents, text = (np.asarray(clips[name]) for name in ("latents", "text"))
    passing = [
        _embed(stem, cfg, put(latents[i : i + 1]), put(text[i : i + 1]), level)
        for i in range(len(latents))
    ]
    found = []
    for layer in range(max(measured_layers(cfg)) + 1):
        # Weights in host memory are moved to the device one layer at a time.
        weights = jax.tree.map(jnp.asarray, layer_of(params, layer))
        spec, each = cfg.memory_of(layer), []
        for i, clip in enumerate(passing):
            x, measures = _apply(weights, cfg, spec, blocks, clip)
            passing[i] = clip._replace(x=x)
            each.append(measures)
        if layer in measured_layers(cfg):
            pairs = jax.device_get(each)
            mean = lambda *values: np.mean(np.concatenate(values), axis=0, dtype=np.float64)
            found.append(jax.tree.map(mean, *pairs))
    return found


@functools.partial(jax.jit, static_argnums=(1, 4))
def _embed(stem: Params, cfg: ModelConfig, latents, text, level: float = 0.0) -> Clip:
    """Embed the copy of clips that is written to the memories."""
    timestep = 1000 * jnp.full(latents.shape[:2], level, jnp.float32)
    module = make_stem(cfg, cast_params(stem, cfg))
    both = embed_clip(module, cfg, latents, latents, timestep, text, timestep)
    clean = lambda x: x.reshape(-1, 2, *x.shape[1:])[:, 0]
    modulation = clean(both.conditions.modulation)
    return both._replace(
        x=_shard_tokens(clean(both.x)), conditions=Conditions(modulation, both.conditions.grid)
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _apply(weights: Params, cfg: ModelConfig, spec: MemorySpec, blocks: int, clip: Clip):
    """Apply a layer to clean clips: (tokens, measures of its memory, [B, H] each, if any)."""
    layer = make_layer(cfg, spec, cast_params(weights, cfg))
    h, grid = layer.attention_input(clip.x, clip.conditions), clip.conditions.grid
    p, measure = layer.self_attn.project(h), getattr(layer.memory, "measure", None)
    measures = measure(p, grid, blocks) if measure and cfg.memory_gate != "zero" else {}
    attended, _ = layer.memory.attend_clip(p, grid, blocks, copies=1)
    context = layer.cross_attn.encode(clip.text)
    x = layer.finish(clip.x, layer.self_attn.output(attended), clip.conditions, context)
    # Small and needed by every process.
    return _shard_tokens(x), {name: constrain(y, PartitionSpec()) for name, y in measures.items()}


def _shard_tokens(x: Array) -> Array:
    """Shard tokens alike before every layer, so that nothing is compiled twice."""
    return constrain(x, PartitionSpec(CLIPS, BLOCKS))


def _on_devices(params: Params) -> bool:
    return isinstance(jax.tree.leaves(params)[0], jax.Array)


def forgotten(measures: Measures) -> str | None:
    """Return one line that names the layers that forget a block, and the remedy, or None.

    A layer forgets if the median of "retention" over its heads is below 0.01.
    """
    shares = dict(zip(measures["layers"], measures.get("retention", ()), strict=True))
    lost = {layer: max(row) for layer, row in shares.items() if np.median(row) < FORGOTTEN}
    if not lost:
        return None
    which = "layer" if len(lost) == 1 else "layers"
    return (
        f"hybrid {which} {in_ranges(list(lost))} forget the content of the state within one block "
        f"of {measures['tokens_per_block']} tokens: the median head keeps less than "
        f"{FORGOTTEN:.0%} of it, the best {max(lost.values()):.1e}; convert with "
        "model.memory_init=by_block"
    )


def in_ranges(numbers: list[int]) -> str:
    """Return rising numbers as ranges, such as "0-3,5"."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in ranges)


def warn_if_forgotten(measures: Measures) -> None:
    """Log one line of warning if hybrid layers forget a block, see `forgotten`."""
    if text := forgotten(measures):
        logging.warning("%s", text)


def record_retention(
    config: Config, params: Params, data: ClipData, folder: epath.Path, *, warn: bool = False
) -> None:
    """Measure a run's model on one held-out clip and write `folder/retention.json`.

    Do nothing if the file exists, if no layer has a memory to measure, or if none is converted.

    Args:
      config: the run.
      params: all parameters of its model.
      data: its clips.
      folder: folder of the run, or of one of its phases.
      warn: whether to warn of layers that forget a block.
    """
    path = folder / "retention.json"
    if (
        not measured_layers(config.model)
        or not {"stage1", "stage2"} & {*config.phases}
        or path.exists()
    ):
        return
    measures = retention(
        params, config.model, data.held_out(1), context_noise=config.sampler.context_noise
    )
    medians = [float(np.median(row)) for row in measures["retention"]]
    logging.info(
        "%s: a block leaves %.1e to %.1e of a random state (median head, by layer)",
        folder.name, min(medians), max(medians),
    )  # fmt: skip
    if warn:
        warn_if_forgotten(measures)
    if jax.process_index() == 0:
        write_whole(path, (json.dumps(measures) + "\n").encode())
