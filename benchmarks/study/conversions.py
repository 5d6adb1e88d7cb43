"""Conversions of a teacher: trained by the library's pipeline, measured, and stored."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax

from arl2_jax import sharding
from arl2_jax.config import Config
from arl2_jax.data import open_data
from arl2_jax.evaluation.gap import Model
from arl2_jax.evaluation.rank_choice import RankChoice
from arl2_jax.evaluation.rank_layers import rank_layers
from arl2_jax.models import Params, without_delta
from arl2_jax.training.partition import merge_params
from arl2_jax.training.pipeline import convert, prepare
from arl2_jax.weights import load_params
from study.measures import Students, measure_students
from study.recipes import Job, changed, conversion_config, conversion_stages
from study.stored import Folder, load_student, save_student
from study.teachers import last_stage

# Fields of the logs that tell how a stage went.
_LOGGED = ("step", "loss")


def with_teacher(base: Config, size: str, job: Job, folder: Folder) -> Config:
    """The study's configuration with the weights of a job's teacher."""
    place = folder.teacher(job.teacher, last_stage(size))
    return changed(base, {"teacher.weights": str(place)})


def run_conversion(
    base: Config, size: str, job: Job, folder: Folder, changes: dict[str, Any]
) -> tuple[Config, dict[str, Any]]:
    """Convert a teacher, stage by stage, and measure what comes of it.

    Args:
      base, size, job, folder: as elsewhere.
      changes: of single stages, "stage:field" -> value.
    """
    assert job.variant is not None
    scratch = folder.scratch(job.name)
    config = conversion_config(with_teacher(base, size, job, folder), job.variant, job.seed)
    runs = conversion_stages(config, size, str(scratch), changes)
    params, done = None, {}
    for name, run in runs.items():
        place, data, start = prepare(run)
        done[name] = convert(run, place, data, start if params is None else params)
        params = done[name].stage2 or done[name].stage1
    assert params is not None
    save_student(folder.student(job.name), params)
    untrained = next(iter(done.values())).untrained
    # As it is read back for rollouts.
    stored = student_params(without_delta(untrained), folder, job.name)
    started = done["start"].stage1 if "start" in done else None
    stage1 = Model(started, config.model) if started else None
    found = Students(Model(untrained, config.model), stage1, Model(stored, config.model))
    teacher = Model(without_delta(untrained), config.model.teacher())
    began = time.perf_counter()
    measures = measure_students(config, open_data(config), teacher, found)
    phases = [(name, phase) for name in done for phase in runs[name].phases]
    result = {
        "kind": "conversion",
        "variant": job.variant,
        "teacher": job.teacher,
        "seed": job.seed,
        "seconds": {name: done[name].seconds[phase] for name, phase in phases},
        "compile_seconds": {name: done[name].compile_seconds[phase] for name, phase in phases},
        "seconds_measures": time.perf_counter() - began,
        "fit": _read(scratch / "start" / "stage1" / "start.json"),
        "curves": {name: _curve(scratch / name / phase) for name, phase in phases},
    }
    shutil.rmtree(scratch, ignore_errors=True)
    return config, result | measures


def student_params(teacher: Params, folder: Folder, name: str) -> Params:
    """All parameters of a student, where its teacher's are."""
    layout = jax.tree.leaves(teacher)[0].sharding
    added = load_student(folder.student(name))
    return merge_params(teacher, jax.tree.map(lambda x: jax.device_put(x, layout), added))


def teacher_params(config: Config, folder: Folder, job: Job, size: str) -> Params:
    """The parameters of a job's teacher."""
    params = load_params(folder.teacher(job.teacher, last_stage(size)), config.model.teacher())
    mesh = sharding.make_mesh(config.train.mesh)
    return sharding.put(params, sharding.tree_shardings(params, mesh))


def run_ranking(
    base: Config, size: str, job: Job, folder: Folder, steps: int
) -> tuple[Config, dict[str, Any]]:
    """Rank the layers of a teacher, by what is cheap and by the measured loss of each swap.

    Args:
      base, size, job, folder: as elsewhere.
      steps: of stage 2, for each layer alone.
    """
    scratch = folder.scratch(job.name)
    fewer = max(base.evaluation.recall_clips // 4 * 2, 2)
    config = changed(
        with_teacher(base, size, job, folder),
        {"train.seed": job.seed, "evaluation.recall_clips": fewer},
    )
    ranking = rank_layers(config, scratch, RankChoice(stage2_steps=steps))
    ranking.pop("config")
    shutil.rmtree(scratch, ignore_errors=True)
    facts = {"kind": "ranking", "teacher": job.teacher, "seed": job.seed, "stage2_steps": steps}
    return config, facts | ranking


def _curve(folder: Path) -> list[dict[str, float]]:
    """Loss over the steps of a phase."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: record[name] for name in _LOGGED} for record in records]


def _read(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None
