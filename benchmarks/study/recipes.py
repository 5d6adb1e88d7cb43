"""Jobs of the study by name, and the configuration of each."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from arl2_jax.config import Config, from_config_dict, to_config_dict
from arl2_jax.errors import ConfigError
from arl2_jax.evaluation.ranking import hybrid_count
from configs import sprites_gpu

SHARES = {"all": 1.0, "p75": 0.75, "p50": 0.5}
INITS = ("by_block", "published")
# Of the all-hybrid model that starts by block. The fit knows reads of whole blocks alone.
ABLATIONS: dict[str, dict[str, Any]] = {
    "random_start": {"stage1.start": "random"},
    "additive": {"model.delta.rule": "additive"},
    "no_decay": {"model.delta.decay": "none"},
    "beta_max_1": {"model.delta.beta_max": 1.0},
    "reset": {"model.delta.span": "block"},
    "context_noise": {"sampler.context_noise": 0.1},
    "control_local": {
        "model.memory_gate": "local", "stage1.start": "random", "phases": ("stage2",),
    },
    "token_read": {"model.delta.read": "token", "stage1.start": "random"},
}  # fmt: skip
# Conversions have half of the configuration's steps of stage 2, but for those of this ending.
LONG = "_long"
_MAIN = ("all_by_block", "all_published")
LONGER = tuple(f"all_{init}{LONG}" for init in INITS)
_NAME = re.compile(
    r"(?P<kind>teacher|ranking|(?P<with>rollout|long_recall)_(?P<of>\w+?)|(?P<variant>\w+?))"
    r"-t(?P<teacher>\d+)(-s(?P<seed>\d+))?"
)


class Job(NamedTuple):
    """One run of the study, with its result.

    Attributes:
      name: such as "all_by_block-t0-s1", also that of its file.
      kind: "teacher", "conversion", "rollout", "long_recall" or "ranking".
      variant: name of `VARIANTS`, of what is converted or continued; None for teachers.
      teacher: seed of the teacher.
      seed: of the conversion; that of the teacher where there is none.
    """

    name: str
    kind: str
    variant: str | None
    teacher: int
    seed: int

    @property
    def conversion(self) -> str | None:
        """Name of the conversion that a rollout or long recall is of; None for the teacher."""
        return self.variant and f"{self.variant}-t{self.teacher}-s{self.seed}"


def variants() -> list[str]:
    """Return the names of all conversions, in an order in which neighbors share programs."""
    shares = [f"{share}_{init}" for init in INITS for share in SHARES]
    return [*shares, *LONGER, *ABLATIONS]


def parse_job(name: str) -> Job:
    """The job of a name.

    Raises:
      ConfigError: there is none.
    """
    match = _NAME.fullmatch(name)
    of = match and (match["variant"] or match["of"])
    known = match and (of in (None, "teacher") or of in variants())
    # A teacher has no seed but its own.
    alone = match and "teacher" in (match["kind"], of)
    if not match or not known or bool(match["seed"]) == bool(alone):
        raise ConfigError(
            f"jobs={name} is unknown; a job is teacher-tT, ranking-tT-sS, V-tT-sS, or of these "
            "rollout_teacher-tT, long_recall_teacher-tT, rollout_V-tT-sS or long_recall_V-tT-sS, "
            f"with seeds T and S and V one of {', '.join(variants())}"
        )
    kind = match["with"] or ("conversion" if match["variant"] else match["kind"])
    teacher = int(match["teacher"])
    variant = None if of == "teacher" else of
    return Job(name, kind, variant, teacher, int(match["seed"] or teacher))


def all_jobs(seeds: Sequence[int], teachers: Sequence[int]) -> list[str]:
    """Return every job of the study: first those that others depend on and that tell most.

    Args:
      seeds: of conversions.
      teachers: seeds of teachers; the conversions of one seed are those of the teacher in the same
        place, of the last one where there are fewer.
    """
    of = {seed: teachers[min(i, len(teachers) - 1)] for i, seed in enumerate(seeds)}
    place = lambda variant, seed: f"{variant}-t{of[seed]}-s{seed}"
    jobs = [f"teacher-t{teacher}" for teacher in teachers]
    first = seeds[0]
    headline = (*LONGER, *_MAIN)
    longest = LONGER[0]
    each = (*headline, f"rollout_{longest}", f"long_recall_{longest}", "ranking")
    jobs += [place(name, first) for name in (*each, f"rollout_{LONGER[1]}")]
    jobs += [place(variant, first) for variant in variants() if variant not in headline]
    jobs += [f"rollout_teacher-t{teachers[0]}", f"long_recall_teacher-t{teachers[0]}"]
    jobs += [place(name, seed) for seed in seeds[1:] for name in each]
    rest = [v for v in variants() if v not in (*headline, "token_read")]
    return jobs + [place(variant, seed) for seed in seeds[1:] for variant in rest]


def base_config(size: str, changes: Mapping[str, Any]) -> Config:
    """The study's configuration.

    Clips are made in the training process: worker processes take seconds to start, in every phase.

    Args:
      size: variant of configs/sprites_gpu.py.
      changes: dotted field -> value.
    """
    return changed(
        from_config_dict(sprites_gpu.get_config(size)), {"data.workers": 0} | {**changes}
    )


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with other values of some fields.

    Raises:
      ConfigError: a field is unknown, or its value is refused.
    """
    tree = to_config_dict(config)
    for name, value in changes.items():
        *groups, field = name.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ConfigError(
                    "is an unknown field", field=name, remedy=f"{group} has no fields"
                )
        place[field] = value
    return from_config_dict(tree)


def parse_changes(texts: Sequence[str]) -> dict[str, Any]:
    """Texts such as "teacher.learning_rate=4e-3" as dotted field -> value.

    Raises:
      ConfigError: a text is no assignment.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"set={text} must be FIELD=VALUE, such as teacher.learning_rate=4e-3")
        try:
            found[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            found[name] = value
    return found


def teacher_config(config: Config, seed: int, workdir: str) -> Config:
    """The run that trains a teacher; arguments as of `conversion_config`."""
    run = {"model.hybrid_layers": (), "phases": ("teacher",)}
    return changed(config, run | {"train.seed": seed, "train.workdir": workdir})


def conversion_config(config: Config, variant: str, seed: int, workdir: str) -> Config:
    """The run that makes a conversion of a teacher.

    Args:
      config: the study's, with the teacher's weights.
      variant: one of `variants()`; "_long" keeps all steps of stage 2, the others take half.
      seed: of the run.
      workdir: folder of the run.
    """
    changes: dict[str, Any] = {
        "phases": ("stage1", "stage2"), "evaluation.controls": (), "train.seed": seed,
        "train.workdir": workdir,
    }  # fmt: skip
    if not variant.endswith(LONG):
        stage2 = config.stage2
        changes |= {f"stage2.{n}": getattr(stage2, n) // 2 for n in ("steps", "short_steps")}
    if variant in ABLATIONS:
        # A part of the test is enough to see large differences.
        fewer = max(config.evaluation.recall_clips // 4 * 2, 2)
        changes |= {"evaluation.recall_clips": fewer} | ABLATIONS[variant]
    else:
        share, _, init = variant.removesuffix(LONG).partition("_")
        layers = hybrid_count(SHARES[share], config.model.num_layers)
        changes |= {"model.hybrid_layers": tuple(range(layers)), "model.memory_init": init}
    return changed(config, changes)
