"""Teachers: trained by the library's pipeline, measured, and stored."""

import shutil
import time
from typing import Any

import jax

from arl2_jax.config import Config
from arl2_jax.evaluation.gap import Model
from arl2_jax.training.pipeline import convert, prepare
from arl2_jax.weights import load_params
from study.measures import measure_teacher
from study.recipes import Job, teacher_config
from study.stored import Folder, loss_curve, save_teacher


def run_teacher(base: Config, job: Job, folder: Folder) -> tuple[Config, dict[str, Any]]:
    """Train and measure a teacher; a training that was cut goes on from its newest checkpoint."""
    scratch = folder.scratch(job.name)
    config = teacher_config(base, job.seed, str(scratch))
    place, data, params = prepare(config)
    trained = convert(config, place, data, params)
    save_teacher(folder.teacher(job.seed), trained.untrained, config.model)
    # As the students will have it: in half precision.
    stored = load_params(folder.teacher(job.seed), config.model)
    teacher = Model(jax.tree.map(jax.numpy.asarray, stored), config.model)
    began = time.perf_counter()
    measures = measure_teacher(config, data, teacher)
    result = {
        "kind": "teacher",
        "teacher": job.teacher,
        "seed": job.seed,
        "seconds": trained.seconds,
        "compile_seconds": trained.compile_seconds,
        "seconds_measures": time.perf_counter() - began,
        "curves": {"teacher": loss_curve(scratch / "teacher")},
        "peak_bytes": _device_memory(),
    }
    shutil.rmtree(scratch, ignore_errors=True)
    return config, result | measures


def _device_memory() -> int | None:
    """Largest number of bytes in use on the device so far, where it tells."""
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
