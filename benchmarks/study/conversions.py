"""Conversions of a teacher: trained by the library's pipeline, measured, and stored."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax

from arl2_jax import sharding
from arl2_jax.config import Config, ModelConfig
from arl2_jax.evaluation.gap import Model
from arl2_jax.evaluation.rank_choice import RankChoice
from arl2_jax.evaluation.rank_layers import rank_layers
from arl2_jax.models import Params, is_stacked, stack_params, without_delta
from arl2_jax.training.partition import merge_params
from arl2_jax.training.pipeline import convert, prepare
from arl2_jax.weights import load_params
from study.measures import Students, measure_students
from study.recipes import Job, changed, conversion_config
from study.stored import Folder, load_student, loss_curve, save_student


def with_teacher(base: Config, job: Job, folder: Folder) -> Config:
    """The study's configuration with the weights of a job's teacher."""
    return changed(base, {"teacher.weights": str(folder.teacher(job.teacher))})


def run_conversion(base: Config, job: Job, folder: Folder) -> tuple[Config, dict[str, Any]]:
    """Convert a teacher and measure what comes of it."""
    assert job.variant is not None
    scratch = folder.scratch(job.name)
    config = conversion_config(with_teacher(base, job, folder), job.variant, job.seed, str(scratch))
    place, data, params = prepare(config)
    converted = convert(config, place, data, params)
    assert converted.stage2 is not None
    save_student(folder.student(job.name), converted.stage2)
    # As it is read back for rollouts.
    stored = student_params(without_delta(converted.untrained), config.model, folder, job.name)
    stage1 = converted.stage1 and Model(converted.stage1, config.model)
    found = Students(Model(converted.untrained, config.model), stage1, Model(stored, config.model))
    teacher = Model(without_delta(converted.untrained), config.model.teacher())
    began = time.perf_counter()
    measures = measure_students(config, data, teacher, found)
    result = {
        "kind": "conversion",
        "variant": job.variant,
        "teacher": job.teacher,
        "seed": job.seed,
        "seconds": converted.seconds,
        "compile_seconds": converted.compile_seconds,
        "seconds_measures": time.perf_counter() - began,
        "fit": _read(scratch / "stage1" / "start.json"),
        "curves": {name: loss_curve(scratch / name) for name in ("stage1", "stage2")},
    }
    shutil.rmtree(scratch, ignore_errors=True)
    return config, result | measures


def student_params(teacher: Params, cfg: ModelConfig, folder: Folder, name: str) -> Params:
    """All parameters of a student, where its teacher's are; stacked if these are."""
    layout = jax.tree.leaves(teacher)[0].sharding
    added = load_student(folder.student(name))
    if is_stacked(teacher):
        added = stack_params(added, cfg)
    return merge_params(teacher, jax.tree.map(lambda x: jax.device_put(x, layout), added))


def teacher_params(config: Config, folder: Folder, job: Job) -> Params:
    """The parameters of a job's teacher."""
    params = load_params(folder.teacher(job.teacher), config.model.teacher())
    mesh = sharding.make_mesh(config.train.mesh)
    return sharding.put(params, sharding.tree_shardings(params, mesh))


def run_ranking(
    base: Config, job: Job, folder: Folder, steps: int
) -> tuple[Config, dict[str, Any]]:
    """Rank the layers of a teacher, by what is cheap and by the measured loss of each swap.

    Args:
      base, job, folder: as elsewhere.
      steps: of stage 2, for each layer alone.
    """
    scratch = folder.scratch(job.name)
    fewer = max(base.evaluation.recall_clips // 4 * 2, 2)
    config = changed(
        with_teacher(base, job, folder),
        {
            "train.seed": job.seed,
            "evaluation.recall_clips": fewer,
            # Short clips alone: one program for each layer.
            "stage2.short_steps": base.stage2.steps,
        },
    )
    ranking = rank_layers(config, scratch, RankChoice(stage2_steps=steps))
    ranking.pop("config")
    shutil.rmtree(scratch, ignore_errors=True)
    facts = {"kind": "ranking", "teacher": job.teacher, "seed": job.seed, "stage2_steps": steps}
    return config, facts | ranking


def _read(file: Path) -> Any:
    return json.loads(file.read_text()) if file.exists() else None
