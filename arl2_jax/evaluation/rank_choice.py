"""Settings of a ranking of layers, and their checks before anything is compiled."""

import dataclasses
from collections.abc import Sequence

from etils import epath

from arl2_jax import sharding
from arl2_jax.config import Config
from arl2_jax.errors import ConfigError
from arl2_jax.evaluation.measure import recall_reason
from arl2_jax.evaluation.ranking import MEASURES, hybrid_count
from arl2_jax.training.retention import in_ranges
from arl2_jax.weights import model_config


@dataclasses.dataclass(frozen=True)
class RankChoice:
    """Measures of a ranking, and how to choose layers by them.

    Attributes:
      measures: names of `arl2_jax.evaluation.ranking.MEASURES`; () takes all that the clips allow.
      by: the measure to choose by; None takes the most expensive of them.
      share: share of the layers to convert, in (0, 1].
      stage2_steps: steps of stage 2 for each single layer, for "swap_after_stage2"; 0 leaves the
        measure out.
    """

    measures: tuple[str, ...] = ()
    by: str | None = None
    share: float = 0.75
    stage2_steps: int = 0


def chosen_measures(config: Config, choice: RankChoice) -> tuple[tuple[str, ...], str]:
    """Return the measures, cheapest first, and the one to choose by.

    Raises:
      ConfigError: one is unknown, or cannot be taken.
    """
    if choice.stage2_steps < 0:
        raise ConfigError("must not be negative", field="stage2_steps", value=choice.stage2_steps)
    reason = recall_reason(config)
    allowed = [
        name
        for name in MEASURES
        if not (name == "exchange" and reason)
        and not (name == "swap_after_stage2" and not choice.stage2_steps)
    ]
    wanted = {*choice.measures} or {*allowed}
    if choice.stage2_steps:
        wanted.add("swap_after_stage2")
    known = ", ".join(MEASURES)
    if unknown := sorted(wanted - {*MEASURES}):
        raise ConfigError(
            "is unknown", field="measures", value=",".join(unknown), remedy=f"known are {known}"
        )
    if "exchange" in wanted and reason:
        raise ConfigError(
            f"cannot be taken: {reason}", field="measures", value="exchange", remedy="leave it out"
        )
    if "swap_after_stage2" in wanted and choice.stage2_steps <= 0:
        raise ConfigError(
            f"needs stage2_steps above 0, not {choice.stage2_steps}",
            field="measures",
            value="swap_after_stage2",
            remedy="set it, such as stage2_steps=50",
        )
    measures = tuple(name for name in MEASURES if name in wanted)
    by = choice.by or measures[-1]
    if by not in MEASURES:
        raise ConfigError("is unknown", field="by", value=by, remedy=f"known are {known}")
    if by not in measures:
        raise ConfigError(
            f"is not among measures={','.join(measures)}", field="by", value=by, remedy="add it"
        )
    return measures, by


def all_hybrid(config: Config, out: epath.PathLike) -> Config:
    """Return the run that converts all layers by stage 1, in a separate folder.

    Raises:
      ConfigError: its memory is closed.
    """
    model = config.model
    if model.memory_gate != "learned":
        raise ConfigError(
            "is a control without memory: there is nothing to rank",
            field="model.memory_gate",
            value=model.memory_gate,
            remedy="set model.memory_gate=learned",
        )
    every = tuple(range(model.num_layers))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(model, hybrid_layers=every, memories=()),
        phases=("stage1",),
        train=dataclasses.replace(config.train, workdir=str(out)),
    )


def check_ranking(config: Config, choice: RankChoice, measures: Sequence[str]) -> None:
    """Reject settings that a training run accepts, but that make no ranking.

    Args:
      config: the run, as `all_hybrid` returns it.
      choice: settings of the ranking.
      measures: as `chosen_measures` returns them.

    Raises:
      ConfigError: one line naming the field, its value and the remedy.
    """
    layers, weights = config.model.num_layers, config.teacher.weights
    if not 0 < choice.share <= 1 or not hybrid_count(choice.share, layers):
        raise ConfigError(
            f"must be in (0, 1] and at least one of the {layers} layers",
            field="share",
            value=f"{choice.share:g}",
            remedy="set it, such as share=0.75",
        )
    if config.blocks < 2:
        raise ConfigError(
            "gives clips of one block, which read nothing from a memory",
            field="data.frames",
            value=config.data.frames,
            remedy="set it to several times model.frames_per_block",
        )
    if weights == "random":
        raise ConfigError(
            "is an untrained model, whose layers cannot be ranked",
            field="teacher.weights",
            value="random",
            remedy="name trained weights, or rank the teacher of a finished run",
        )
    if hybrid := model_config(weights, num_heads=config.model.num_heads).hybrid_layers:
        left = f"leave {layers - len(hybrid)} of {layers}" if len(hybrid) < layers else "leave none"
        raise ConfigError(
            f"has hybrid layers {in_ranges(list(hybrid))}, which {left} softmax",
            field="teacher.weights",
            value=weights,
            remedy="name the softmax weights that it was converted from",
        )
    if "swap_after_stage2" in measures:
        mesh, stage2 = sharding.make_mesh(config.train.mesh), config.stage2
        sharding.check_batch(mesh, stage2.batch_size, stage2.accumulation, "stage2")
