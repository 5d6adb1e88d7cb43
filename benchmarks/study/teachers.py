"""Training of the teachers, with recall along the way: the first part of the study."""

import json
import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from arl2_jax import models
from arl2_jax.config import Config, ConfigError
from arl2_jax.data import ClipData, open_data
from arl2_jax.evaluation.gap import Batch, Model, held_out_losses
from arl2_jax.models import Params
from arl2_jax.storage import write_whole
from arl2_jax.training.loop import data_seed
from arl2_jax.training.step import init_state, make_step
from arl2_jax.weights import load_params
from study.clock import Clock
from study.measures import measure_teacher, recall_scores
from study.recipes import STAGES, Job, changed, stage_changes
from study.stored import Folder, save_teacher

# Clips of the test along the way, and of the loss beside it.
_CLIPS, _LOSS_CLIPS = 64, 16
# Seconds that must be left to go on training, so that what has been learned can be stored.
_TO_STORE = 20


def last_stage(size: str) -> str:
    """Name of the stage after which a teacher is finished."""
    return list(STAGES[size])[-1]


def stage_config(base: Config, size: str, stage: str, changes: dict[str, Any], seed: int) -> Config:
    """The run that is a stage of a teacher's training.

    Args:
      base: the study's configuration.
      size: variant of configs/sprites_gpu.py.
      stage: one of `STAGES`.
      changes: of single stages, "stage:field" -> value.
      seed: of the teacher.
    """
    run = {"model.hybrid_layers": (), "phases": ("teacher",), "train.seed": seed}
    return changed(base, run | STAGES[size][stage] | stage_changes(changes, stage))


def run_teacher(
    base: Config, size: str, job: Job, folder: Folder, clock: Clock, changes: dict, every: int
) -> tuple[Config, dict[str, Any]] | None:
    """Train and measure a teacher; stages that are finished are read back.

    The programs of all stages are compiled at once, beside the training of the first.

    Returns:
      Its configuration and what was measured; None if the time was too short.
    """
    params, stages = None, {}
    configs = {stage: stage_config(base, size, stage, changes, job.seed) for stage in STAGES[size]}
    with ThreadPoolExecutor(len(configs)) as pool:
        plans = {
            stage: _plan(config, folder.teacher(job.seed, stage), pool)
            for stage, config in configs.items()
        }
        for stage, plan in plans.items():
            params, facts = _stage(plan, params, clock, every)
            stages[stage] = facts
            if not facts["finished"]:
                logging.warning("%s: cut after %d steps of %s", job.name, facts["steps"], stage)
                return None
    if clock.left() < _TO_STORE:
        return None
    config = configs[last_stage(size)]
    # As the students will have it: in half precision.
    stored = load_params(folder.teacher(job.seed, last_stage(size)), config.model)
    teacher = Model(jax.tree.map(jax.numpy.asarray, stored), config.model)
    began = time.perf_counter()
    measures = measure_teacher(config, open_data(config), teacher)
    return config, {
        "kind": "teacher", "teacher": job.teacher, "seed": job.seed, "stages": stages,
        "seconds_measures": time.perf_counter() - began,
    } | measures  # fmt: skip


class _Plan(NamedTuple):
    """What is left to do of a stage.

    Attributes:
      config: the run, with the steps that are left.
      place: folder of the weights.
      facts: what its file tells of earlier sessions; None if there was none.
      program: the compiled step and the seconds of compilation, to come; None if nothing is left.
    """

    config: Config
    place: Path
    facts: dict[str, Any] | None
    program: Future | None


def _plan(config: Config, place: Path, pool: ThreadPoolExecutor) -> _Plan:
    file = place.with_suffix(".json")
    facts = json.loads(file.read_text()) if file.exists() else None
    if facts and facts["finished"]:
        return _Plan(config, place, facts, None)
    left = config.teacher.steps - (facts["steps"] if facts else 0)
    warmup = min(config.teacher.warmup, max(left // 4, 1))
    config = changed(config, {"teacher.steps": left, "teacher.warmup": warmup})
    return _Plan(config, place, facts, pool.submit(_compile, config))


def _compile(config: Config) -> tuple[Any, float]:
    """The step of a teacher, and the seconds that it took to compile."""
    began, model, size = time.perf_counter(), config.model, config.teacher.batch_size
    start = lambda: init_state(
        config, "teacher", models.init_params(model, jax.random.key(0)), jax.random.key(0)
    )
    float32 = lambda *shape: jax.ShapeDtypeStruct((size, *shape), np.float32)
    batch = {
        "latents": float32(config.data.frames, *config.latent_shape),
        "text": float32(model.text_len, model.text_dim),
    }
    step = jax.jit(make_step(config, "teacher"), donate_argnums=0)
    program = step.lower(jax.eval_shape(start), {}, batch).compile()
    return program, time.perf_counter() - began


def _stage(
    plan: _Plan, params: Params | None, clock: Clock, every: int
) -> tuple[Params, dict[str, Any]]:
    """Parameters after a stage, and what it took; a stage that was cut goes on from its weights."""
    config, facts = plan.config, plan.facts
    if facts:
        params = load_params(plan.place, config.model)
        if plan.program is None:
            return params, facts
    if params is None:
        params = models.init_params(config.model, jax.random.key(config.train.seed))
    done, sessions = (facts["steps"], facts["sessions"]) if facts else (0, [])
    # Another part of a stage sees other clips.
    seed = data_seed(config, "teacher") + 10**6 * len(sessions)
    params, session = _train(plan, params, clock, every, seed)
    facts = {
        "steps": done + session["steps"],
        "finished": session["steps"] == config.teacher.steps,
        "batch_size": config.teacher.batch_size,
        "frames": config.data.frames,
        "sessions": [*sessions, session],
    }
    save_teacher(plan.place, params, config.model)
    file = epath.Path(plan.place.with_suffix(".json"))
    write_whole(file, (json.dumps(facts) + "\n").encode())
    return params, facts


def _train(
    plan: _Plan, params: Params, clock: Clock, every: int, seed: int
) -> tuple[Params, dict[str, Any]]:
    """Train a teacher for the steps of a plan, or as long as there is time.

    Args:
      plan: the stage.
      params: at the start.
      clock: the time that is left.
      every: steps between two tests.
      seed: of the clips.

    Returns:
      Averaged parameters; "steps", "seconds" (of the steps alone), "compile_seconds" and "curve", a
      list of "step", "loss" (of training), "held_out_loss", "recall" and "seconds".

    Raises:
      ConfigError: training has diverged.
    """
    assert plan.program is not None
    config, steps = plan.config, plan.config.teacher.steps
    data, key = open_data(config), jax.random.key(seed)
    state = init_state(config, "teacher", params, key)
    held_out = data.held_out(min(_LOSS_CLIPS, config.data.held_out))
    batches = data.train_batches(config.teacher.batch_size, seed)
    step, compiled = plan.program.result()
    seconds = longest = 0.0
    curve, done = [], 0
    try:
        batch = next(batches)
        while done < steps and clock.left() > _TO_STORE + longest:
            began = time.perf_counter()
            metrics = {}
            for _ in range(min(every, steps - done)):
                state, metrics = step(state, {}, batch)
                done, batch = done + 1, next(batches)
            loss = float(metrics["loss"])
            seconds += time.perf_counter() - began
            if not math.isfinite(loss):
                raise ConfigError(
                    f"teacher.learning_rate={config.teacher.learning_rate}: the loss is {loss} at "
                    f"step {done}; lower it"
                )
            scores = _test(config, data, held_out, state.ema)
            point = {"step": done, "loss": loss} | scores | {"seconds": seconds}
            logging.info("teacher: %s", point)
            curve.append(point)
            if len(curve) > 1:  # the first test compiles
                longest = max(longest, time.perf_counter() - began)
    finally:
        batches.close()
    return state.ema, {
        "steps": done, "seconds": seconds, "compile_seconds": compiled, "curve": curve,
        "peak_bytes": _device_memory(),
    }  # fmt: skip


def _test(config: Config, data: ClipData, held_out: Batch, params: Params) -> dict[str, float]:
    """Loss on held-out clips, and recall in a small test."""
    fewer = {
        "evaluation.recall_clips": min(_CLIPS, config.evaluation.recall_clips),
        "evaluation.recall_noises": 1,
    }
    model = Model(params, config.model)
    scores = recall_scores(changed(config, fewer), data, model, only=True)
    return {
        "held_out_loss": held_out_losses(*model, held_out, config.sampler, jax.random.key(0)),
        "recall": scores["recall"]["recall"],
    }


def _device_memory() -> int | None:
    """Largest number of bytes in use on the device so far, where it tells."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
