"""The study at true token density: what all-hybrid and mixed models recall, and for how long.

    PYTHONPATH=. python benchmarks/sprites_study.py --out=runs/study
    PYTHONPATH=. python benchmarks/sprites_study.py --out=runs/study --collect

Teachers of configs/sprites_gpu.py are trained, converted in several ways, and measured. Models
then generate a thousand blocks (rollouts), and are tested in true videos of that length (long
recall). The layers of teachers are ranked. Conversions take half of the configuration's steps of
stage 2, and all of them if the name ends in _long.

Every run leaves a result in OUT/results and is not repeated; later ones read OUT/teachers (10 MB a
teacher) and OUT/students (2 MB each). So the study can continue elsewhere with only these folders.
An interrupted run resumes from its last checkpoint, in OUT/scratch. Several processes may work on
one folder at once: each takes runs that no other has.

    --jobs=teacher-t0,all_by_block-t0-s0     these runs alone, in this order
    --minutes=9                              start nothing that would take longer
    --set=teacher.learning_rate=4e-3         a field of the configuration, may be repeated
    --size=quick                             everything at toy size, for a CPU

--collect adds the results of the folder to those that --result has already. Recipes are compared by
one folder and one such file each. Where JAX_COMPILATION_CACHE_DIR is not set, programs are kept in
OUT/cache.
"""

import json
import os
import sys
import time
from typing import Any

import jax
from absl import app, flags, logging
from study.clock import Claims, Clock
from study.collect import collect
from study.conversions import run_conversion, run_ranking
from study.recipes import Job, all_jobs, base_config, parse_changes, parse_job
from study.rollouts import run_long_recall, run_rollout
from study.stored import Folder, write_result
from study.teachers import run_teacher

from arl2_jax.config import Config
from arl2_jax.errors import UserError

_OUT = flags.DEFINE_string("out", "runs/study", "Folder of the study.")
_SIZE = flags.DEFINE_enum("size", "full", ["full", "quick"], "Variant of the configuration.")
_JOBS = flags.DEFINE_list("jobs", [], "Runs to make, in order; by default all.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of the conversions, for all jobs.")
_TEACHERS = flags.DEFINE_list("teachers", ["0"], "Seeds of the teachers, for all jobs.")
_MINUTES = flags.DEFINE_float("minutes", None, "Time that this call may take.")
_SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE of the configuration.")
_BLOCKS = flags.DEFINE_integer("blocks", 1000, "Blocks of rollouts and of long true videos.")
_VIDEOS = flags.DEFINE_integer("videos", 32, "How many of these videos.")
_ROLLOUT_STEPS = flags.DEFINE_integer("rollout_steps", 32, "Steps of a rollout's sampler.")
_RANK_STEPS = flags.DEFINE_integer("rank_steps", 100, "Steps of stage 2 for each ranked layer.")
_COMMIT = flags.DEFINE_string("commit", None, "Commit to note where there is no repository.")
_COLLECT = flags.DEFINE_bool("collect", False, "Add the results to those merged; run nothing.")
_RESULT = flags.DEFINE_string(
    "result", "benchmarks/results/sprites_study.json", "File of the merged results."
)
# Seconds that a run takes at most as long as none of its kind is known.
_GUESS = {
    "teacher": 700.0,
    "conversion": 700.0,
    "rollout": 200.0,
    "long_recall": 150.0,
    "ranking": 600.0,
}
_POLL = 5.0


def main(_):
    """Run what is missing, or merge what there is."""
    logging.set_verbosity(logging.INFO)
    folder = Folder(_OUT.value)
    try:
        if _COLLECT.value:
            collect(folder, _RESULT.value)
            return
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
            jax.config.update("jax_compilation_cache_dir", str(folder.path.absolute() / "cache"))
        seeds, teachers = (list(map(int, flag.value)) for flag in (_SEEDS, _TEACHERS))
        names = _JOBS.value or all_jobs(seeds, teachers)
        base = base_config(_SIZE.value, parse_changes(_SET.value))
        study = _Study(folder, base, Clock(_MINUTES.value))
        study.run([parse_job(name) for name in names])
        if study.failed:
            sys.exit(f"error: these runs have failed: {', '.join(study.failed)}")
    except UserError as error:
        sys.exit(f"error: {error}")


class _Study:
    """The runs of one process."""

    def __init__(self, folder: Folder, base: Config, clock: Clock):
        self._folder, self._base, self._clock = folder, base, clock
        self._claims = Claims(folder.scratch("claims"))
        self.failed: list[str] = []

    def run(self, jobs: list[Job]) -> None:
        """Run jobs in their order; those whose inputs another process makes wait for them."""
        waiting = list(jobs)
        while waiting:
            started, later = False, []
            for job in waiting:
                if self._folder.result(job.name).exists():
                    continue
                if missing := [name for name in self._needs(job) if not self._has(name)]:
                    known = {other.name for other in waiting}
                    if any(name in known or self._claims.others(name) for name in missing):
                        later.append(job)
                    else:
                        logging.warning("%s is left out: it needs %s", job.name, missing[0])
                elif self._enough_time(job) and self._claims.take(job.name):
                    self._run(job)
                    started = True
            # What this process could not do is worth waiting for if another is at it.
            waiting = [job for job in later if self._clock.left() > self._expected(job)]
            if not started:
                if not any(self._claims.others(name) for job in later for name in self._needs(job)):
                    return
                time.sleep(_POLL)

    def _run(self, job: Job) -> None:
        logging.info("%s begins; %.0f s are left", job.name, self._clock.left())
        began = time.perf_counter()
        try:
            config, result = self._make(job)
            result |= {"seconds_all": time.perf_counter() - began, "commit": _COMMIT.value}
            write_result(self._folder, job.name, config, result)
            logging.info("%s took %.0f s", job.name, result["seconds_all"])
        except Exception:  # what others need time for is not lost with it
            logging.exception("%s has failed", job.name)
            self.failed.append(job.name)
        finally:
            self._claims.release(job.name)

    def _make(self, job: Job) -> tuple[Config, dict[str, Any]]:
        common = (self._base, job, self._folder)
        match job.kind:
            case "teacher":
                return run_teacher(*common)
            case "conversion":
                return run_conversion(*common)
            case "ranking":
                return run_ranking(*common, _RANK_STEPS.value)
            case "long_recall":
                return run_long_recall(*common, _BLOCKS.value, _VIDEOS.value)
        length = _BLOCKS.value, _VIDEOS.value
        return run_rollout(*common, self._clock, *length, _ROLLOUT_STEPS.value)

    def _needs(self, job: Job) -> list[str]:
        """Return the names of the runs that a job depends on."""
        teacher = f"teacher-t{job.teacher}"
        if job.kind == "teacher":
            return []
        of_student = job.kind in ("rollout", "long_recall") and job.conversion
        return [teacher] + ([job.conversion] if of_student else [])

    def _has(self, name: str) -> bool:
        """Whether what a run leaves to others is there."""
        job = parse_job(name)
        if job.kind == "conversion":
            return self._folder.student(name).exists()
        return (self._folder.teacher(job.teacher) / "config.json").exists()

    def _enough_time(self, job: Job) -> bool:
        enough = self._clock.left() > self._expected(job)
        if not enough:
            logging.info("%s is not begun: %.0f s are left", job.name, self._clock.left())
        return enough

    def _expected(self, job: Job) -> float:
        """Seconds of the longest run of a kind that is known, or a guess."""
        if job.kind == "rollout":  # it ends in time
            return _GUESS[job.kind]
        known = (json.loads(file.read_text()) for file in self._folder.results.glob("*.json"))
        times = [run["seconds_all"] for run in known if run["kind"] == job.kind]
        return max(times, default=_GUESS[job.kind])


if __name__ == "__main__":
    app.run(main)
