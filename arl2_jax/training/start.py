"""Start of stage 1 by least squares, on a few clips and layer by layer."""

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from arl2_jax import sharding
from arl2_jax.config import Config, MemorySpec, ModelConfig, to_config_dict
from arl2_jax.data import ClipData
from arl2_jax.memory.recurrence import states_before
from arl2_jax.models import (
    ADDED,
    Params,
    base_of,
    cast_params,
    is_stacked,
    layer_of,
    stack_params,
    stem_of,
)
from arl2_jax.models.wan import Clip, make_layer, make_stem
from arl2_jax.nn.lora import add_update
from arl2_jax.nn.norm import rms_norm
from arl2_jax.sharding import BLOCKS, CLIPS, constrain
from arl2_jax.storage import write_whole
from arl2_jax.training import closed_form
from arl2_jax.training.checkpoint import FROZEN
from arl2_jax.training.closed_form import Readings, Readout
from arl2_jax.training.loop import (
    check_same_teacher,
    data_seed,
    read_json,
    teacher_checksum,
)
from arl2_jax.training.losses import NoisedClip, embed_noised, noise_clip
from arl2_jax.training.partition import TRAINED, merge_params
from arl2_jax.weights.folder import load_params_folder, save_params

# Gauss-Newton steps of a layer; P_v is solved before each and after the last.
ROUNDS = 5


class LayerStart(NamedTuple):
    """Relative squared error of a layer on the clips of the fit, before and after it."""

    before: float
    after: float


def least_squares_start(
    params: Params, cfg: ModelConfig, clips: list[NoisedClip], key: Array
) -> tuple[Params, dict[str, LayerStart]]:
    """Fit P_q, P_v and the gate of every hybrid layer to the teacher's attention.

    Clips go through the teacher once, layer by layer. Only the current layer's queries and states
    are kept, for all clips. The error of stage 1 on these clips never rises.

    Args:
      params: all parameters, in either form; on a mesh, the work is sharded as in training.
      cfg: the model, with the learned gate and reads of whole blocks.
      clips: batches of one shape, noised as in stage 1.
      key: random key of the curvature's estimate.

    Returns:
      The parameters with new phi_q, phi_v and gate_proj, and the errors; layer index -> errors.
    """
    fitted, errors = _fit(params, cfg, clips, key)
    if is_stacked(params):
        fitted = stack_params(fitted, cfg)
    return merge_params(params, fitted), errors


def _fit(params: Params, cfg: ModelConfig, clips: list[NoisedClip], key: Array):
    """Return only the fitted parameters, unstacked, and the errors."""
    layout = jax.tree.leaves(params)[0].sharding
    mesh: Any = layout.mesh if isinstance(layout, NamedSharding) else None
    # Kernels are sharded over this mesh.
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        return _by_layer(params, cfg, clips, key)


def _by_layer(params: Params, cfg: ModelConfig, clips: list[NoisedClip], key: Array):
    stem = stem_of(params)
    blocks = clips[0].clean.shape[1] // cfg.frames_per_block
    passing = [_embed(stem, cfg, clip) for clip in clips]
    fitted, errors = {}, {}
    for i in range(max(cfg.hybrid_layers) + 1):
        weights = layer_of(params, i)
        if i in cfg.hybrid_layers:
            own_key = jax.random.fold_in(key, i)
            spec = cfg.memory_of(i)
            added, errors[str(i)] = _fit_layer(weights, cfg, spec, blocks, passing, own_key)
            fitted[str(i)] = {ADDED: added}
            logging.info("start of layer %d: error %.4f before, %.4f after", i, *errors[str(i)])
        if i < max(cfg.hybrid_layers):
            teacher = cfg.teacher()
            passing = [_teacher_layer(base_of(weights), teacher, blocks, clip) for clip in passing]
    return {"blocks": fitted}, errors


def _fit_layer(
    weights: Params,
    cfg: ModelConfig,
    spec: MemorySpec,
    blocks: int,
    clips: list[Clip],
    key: Array,
) -> tuple[Params, LayerStart]:
    """Return the fitted parameters among a layer's additions, and the errors."""
    readings = [_readings(weights, cfg, spec, blocks, clip) for clip in clips]
    added = weights[ADDED]
    first = Readout(added["phi_q"], added["phi_v"], _columns(added["gate_proj"]["kernel"]))
    output = weights["self_attn"]["o"]["kernel"].astype(jnp.float32)
    readout, errors = fit_readout(first, readings, output, key)
    return _put_like(_as_params(readout), added), errors


def fit_readout(
    readout: Readout, batches: list[Readings], output: Float[Array, "c c"], key: Array
) -> tuple[Readout, LayerStart]:
    """Fit one layer's readout by alternating `solve_values` and `newton_step`.

    Args:
      readout: present values.
      batches: queries and states of the layer.
      output: Wo.
      key: random key of the curvature's estimate.
    """
    total = lambda function, at, *rest: _total(function, batches, at, *rest)
    error = before = float(total(_squared_error, readout, output))
    for turn in range(ROUNDS + 1):
        sums = total(_value_sums, readout)
        solved = readout._replace(phi_v=_solve_values(sums, output, readout.phi_v))
        lower = float(total(_squared_error, solved, output))
        # It is not lower only if rounding is all that is left.
        if lower < error:
            readout, error = solved, lower
        if turn == ROUNDS:
            break
        probe_key = jax.random.fold_in(key, turn)
        gradient, factors = total(_curvature, readout, output, probe_key)
        multiply = functools.partial(_total, _curvature_times, batches, readout, output)
        step = closed_form.newton_step(gradient, factors, multiply)
        along = total(_errors_along, readout, output, step)
        readout, error = closed_form.take_step(readout, step, error, along.tolist())
    clips = sum(len(r.states) for r in batches)
    return readout, LayerStart(before / clips, float(error) / clips)


def _total(function: Callable, batches: list[Readings], readout: Readout, *rest: Any) -> Any:
    """Sum a function's results over batches, one after the other.

    Waiting bounds memory, and the devices of a mesh never run two programs with collectives.
    """
    results = (jax.block_until_ready(function(readout, r, *rest)) for r in batches)
    return functools.reduce(functools.partial(jax.tree.map, jnp.add), results)


_squared_error = jax.jit(closed_form.squared_error)
_value_sums = jax.jit(closed_form.value_sums)
_solve_values = jax.jit(closed_form.solve_values)
_curvature = jax.jit(closed_form.curvature)
_curvature_times = jax.jit(closed_form.curvature_times)
_errors_along = jax.jit(closed_form.errors_along)


@functools.partial(jax.jit, static_argnums=1)
def _embed(stem: Params, cfg: ModelConfig, clip: NoisedClip) -> Clip:
    embedded = embed_noised(make_stem(cfg, cast_params(stem, cfg)), cfg, clip)
    return embedded._replace(x=_shard_tokens(embedded.x))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _teacher_layer(base: Params, cfg: ModelConfig, blocks: int, clip: Clip) -> Clip:
    """Apply a layer of the teacher, `cfg`, to clips."""
    layer = make_layer(cfg, 0, cast_params(base, cfg))
    context = layer.cross_attn.encode(clip.text)
    x, _ = layer.clip(clip.x, clip.conditions, context, blocks, copies=2)
    return clip._replace(x=_shard_tokens(x))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _readings(
    weights: Params, cfg: ModelConfig, spec: MemorySpec, blocks: int, clip: Clip
) -> Readings:
    """Compute the queries and states of a hybrid layer at the teacher's input."""
    weights = cast_params(weights, cfg)
    added = weights[ADDED]
    identity = jnp.broadcast_to(jnp.eye(cfg.head_dim), added["phi_v"].shape)
    layer = make_layer(cfg, spec, weights | {ADDED: added | {"phi_v": identity}})
    memory, grid = layer.memory, clip.conditions.grid
    p = layer.self_attn.project(layer.attention_input(clip.x, clip.conditions))
    clean = p.first_of(2)
    empty = memory.init_state(len(clean.x))
    states = states_before(memory.settings, memory.writes(clean, grid, blocks), empty, blocks)
    q = rms_norm(add_update(p.q_raw, memory.lora_q, p.x), p.q_scale, cfg.eps)

    closed = make_layer(dataclasses.replace(cfg, memory_gate="zero"), spec, weights)
    local, _ = closed.memory.attend_clip(p, grid, blocks, copies=2)
    teacher = make_layer(cfg.teacher(), 0, base_of(weights))
    whole, _ = teacher.memory.attend_clip(p, grid, blocks, copies=2)
    attended = layer.self_attn.output(whole).astype(jnp.float32)
    squares = jnp.sum(jnp.square(attended).reshape(len(clean.x), -1), axis=1)
    return Readings(
        q=q.reshape(p.q.shape),
        states=states,
        x=p.x,
        target=whole.astype(jnp.float32) - local.astype(jnp.float32),
        weights=jnp.repeat(1 / (squares + 1e-12), 2),
        rope=grid.rotation(),
    )


def _shard_tokens(x: Array) -> Array:
    """Shard tokens alike before every layer, so that nothing is compiled twice."""
    return constrain(x, PartitionSpec(CLIPS, BLOCKS))


def _columns(kernel: Float[Array, "c h"]) -> Float[Array, "h c 1"]:
    return kernel.T[:, :, None]


def _as_params(readout: Readout) -> Params:
    kernel = readout.gate[:, :, 0].T
    return {"phi_q": readout.phi_q, "phi_v": readout.phi_v, "gate_proj": {"kernel": kernel}}


def _put_like(new: Params, old: Params) -> Params:
    """Return parameters with the dtypes and shardings of those that they replace."""
    put = lambda x, y: jax.device_put(x.astype(y.dtype), y.sharding)
    return jax.tree.map(put, new, {name: old[name] for name in new})


def start_stage1(config: Config, params: Params, data: ClipData, mesh: Mesh, folder: epath.Path):
    """Return the parameters with which stage 1 begins, by `stage1.start`.

    A fit is kept in `folder/start`, with its errors in `folder/start.json`, and read from there by
    a resumed run, so that it starts from the same parameters.

    Args:
      config: the run.
      params: all parameters, stacked and sharded over the mesh.
      data: clips to train on.
      mesh: devices.
      folder: folder of the phase.
    """
    if config.stage1.start == "random" or config.model.memory_gate == "zero":
        return params
    fit_folder = folder / "start"
    if (fit_folder / "config.json").exists():
        logging.info("stage1 starts from the fit in %s", fit_folder)
        facts = read_json(folder / "start.json") or {}
        check_same_teacher(config, fit_folder, facts.get(FROZEN), params)
        return merge_params(params, _stacked_on(mesh, load_params_folder(fit_folder)[0], config))
    began = time.perf_counter()
    # The numbers below are those of the phases.
    own = jax.random.fold_in(jax.random.key(config.train.seed), len(TRAINED))
    noise_key, fit_key = jax.random.split(own)
    clips = _noised_clips(config, data, mesh, noise_key)
    fitted, errors = _fit(params, config.model, clips, fit_key)
    facts = {
        "clips": config.stage1.start_clips,
        "seconds": time.perf_counter() - began,
        "errors": {layer: found._asdict() for layer, found in errors.items()},
        FROZEN: teacher_checksum(params),
    }
    save_params(fit_folder, fitted, to_config_dict(config.model))
    if jax.process_index() == 0:
        write_whole(folder / "start.json", (json.dumps(facts, indent=2) + "\n").encode())
    return merge_params(params, _stacked_on(mesh, fitted, config))


def _stacked_on(mesh: Mesh, fitted: Params, config: Config) -> Params:
    stacked = stack_params(fitted, config.model)
    return sharding.put(stacked, sharding.tree_shardings(stacked, mesh))


def _noised_clips(config: Config, data: ClipData, mesh: Mesh, key: Array) -> list[NoisedClip]:
    """Return the first clips of stage 1 as noised micro-batches."""
    size = config.stage1.batch_size // config.stage1.accumulation
    batches = data.train_batches(size, data_seed(config, "stage1"))
    # The noise does not depend on the memories.
    noise = jax.jit(noise_clip, static_argnums=(1, 4))
    model, sampler, noised = config.model.teacher(), config.sampler, []
    try:
        for i in range(config.stage1.start_clips // size):
            batch = sharding.put_batch(next(batches), mesh)
            own = jax.random.fold_in(key, i)
            noised.append(noise(own, model, batch["latents"], batch["text"], sampler))
    finally:
        batches.close()
    return noised
