"""Training of the teachers, with recall along the way: the first part of the study."""

import json
import math
import time
from pathlib import Path
from typing import Any

import jax
from absl import logging
from etils import epath

from arl2_jax import models
from arl2_jax.config import Config, ConfigError
from arl2_jax.data import ClipData, open_data
from arl2_jax.evaluation.gap import Model, held_out_losses
from arl2_jax.models import Params
from arl2_jax.storage import write_whole
from arl2_jax.training.loop import data_seed
from arl2_jax.training.step import init_state, make_step
from arl2_jax.weights import load_params
from study.clock import Clock
from study.measures import measure_teacher, recall_scores
from study.recipes import STAGES, Job, changed
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
    own = {
        name.split(":")[1]: value for name, value in changes.items() if name.startswith(f"{stage}:")
    }
    run = {"model.hybrid_layers": (), "phases": ("teacher",), "train.seed": seed}
    return changed(base, run | STAGES[size][stage] | own)


def run_teacher(
    base: Config, size: str, job: Job, folder: Folder, clock: Clock, changes: dict, every: int
) -> tuple[Config, dict[str, Any]] | None:
    """Train and measure a teacher; stages that are finished are read back.

    Returns:
      Its configuration and what was measured; None if the time was too short.
    """
    params, stages = None, {}
    config = base
    for stage in STAGES[size]:
        config = stage_config(base, size, stage, changes, job.seed)
        params, facts = _stage(config, folder.teacher(job.seed, stage), params, clock, every)
        stages[stage] = facts
        if not facts["finished"]:
            logging.warning("%s: cut after %d steps of %s", job.name, facts["steps"], stage)
            return None
    if clock.left() < _TO_STORE:
        return None
    # As the students will have it: in half precision.
    stored = load_params(folder.teacher(job.seed, last_stage(size)), config.model)
    teacher = Model(jax.tree.map(jax.numpy.asarray, stored), config.model)
    began = time.perf_counter()
    measures = measure_teacher(config, open_data(config), teacher)
    return config, {
        "kind": "teacher", "teacher": job.teacher, "seed": job.seed, "stages": stages,
        "seconds_measures": time.perf_counter() - began,
    } | measures  # fmt: skip


def _stage(
    config: Config, place: Path, params: Params | None, clock: Clock, every: int
) -> tuple[Params, dict[str, Any]]:
    """Parameters after a stage, and what it took; a stage that was cut goes on from its weights."""
    file, done, sessions = place.with_suffix(".json"), 0, []
    if file.exists():
        facts = json.loads(file.read_text())
        params = load_params(place, config.model)
        if facts["finished"]:
            return params, facts
        done, sessions = facts["steps"], facts["sessions"]
    if params is None:
        params = models.init_params(config.model, jax.random.key(config.train.seed))
    left = config.teacher.steps - done
    warmup = min(config.teacher.warmup, max(left // 4, 1))
    shorter = changed(config, {"teacher.steps": left, "teacher.warmup": warmup})
    # Another part of a stage sees other clips.
    seed = data_seed(config, "teacher") + 10**6 * len(sessions)
    params, session = train(shorter, params, clock, every, seed)
    done += session["steps"]
    facts = {
        "steps": done,
        "finished": done >= config.teacher.steps,
        "batch_size": config.teacher.batch_size,
        "frames": config.data.frames,
        "sessions": [*sessions, session],
    }
    save_teacher(place, params, config.model)
    write_whole(epath.Path(file), (json.dumps(facts) + "\n").encode())
    return params, facts


def train(
    config: Config, params: Params, clock: Clock, every: int, seed: int
) -> tuple[Params, dict[str, Any]]:
    """Train a teacher for `teacher.steps`, or as long as there is time.

    Args:
      config: the run.
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
    data, steps = open_data(config), config.teacher.steps
    state = init_state(config, "teacher", params, jax.random.fold_in(jax.random.key(seed), steps))
    batches = data.train_batches(config.teacher.batch_size, seed)
    began = time.perf_counter()
    batch = next(batches)
    lowered = jax.jit(make_step(config, "teacher"), donate_argnums=0).lower(state, {}, batch)
    step = lowered.compile()
    compiled = time.perf_counter() - began
    seconds, curve, done = 0.0, [], 0
    try:
        while done < steps and clock.left() > _TO_STORE:
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
            scores = _test(config, data, state.ema)
            point = {"step": done, "loss": loss} | scores | {"seconds": seconds}
            logging.info("teacher: %s", point)
            curve.append(point)
    finally:
        batches.close()
    return state.ema, {
        "steps": done, "seconds": seconds, "compile_seconds": compiled, "curve": curve,
        "memory": _device_memory(),
    }  # fmt: skip


def _test(config: Config, data: ClipData, params: Params) -> dict[str, float]:
    fewer = {
        "evaluation.recall_clips": min(_CLIPS, config.evaluation.recall_clips),
        "evaluation.recall_noises": 1,
    }
    model = Model(params, config.model)
    clips = data.held_out(min(_LOSS_CLIPS, config.data.held_out))
    key = jax.random.key(0)
    return {
        "held_out_loss": held_out_losses(*model, clips, config.sampler, key),
        "recall": recall_scores(changed(config, fewer), data, model, only=True)["recall"]["recall"],
    }


def _device_memory() -> int | None:
    """Largest number of bytes in use on the device so far, where it tells."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
