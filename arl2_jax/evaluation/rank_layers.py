"""Which layers of a softmax model should stay softmax: a configuration to a ranking in files."""

import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from arl2_jax import sharding
from arl2_jax.config import Config, ConfigError, to_config_dict
from arl2_jax.evaluation.layer_measures import (
    Candidates,
    errors_alone,
    flips,
    layer_errors,
    retentions,
    swaps,
    train_alone,
)
from arl2_jax.evaluation.rank_choice import (
    RankChoice,
    all_hybrid,
    check_ranking,
    chosen_measures,
)
from arl2_jax.evaluation.ranking import MEASURES, rank
from arl2_jax.evaluation.ranking_plot import ranking_picture
from arl2_jax.storage import as_json, write_whole
from arl2_jax.training.pipeline import convert, prepare


def rank_layers(config: Config, out: epath.PathLike, choice: RankChoice) -> dict[str, Any]:
    """Rank the layers of a softmax model by how much they need softmax.

    Stage 1 converts all layers at once, as `config.stage1` says; then each is measured. Started
    again with the same configuration, it goes on where it stopped.

    Args:
      config: the run: `teacher.weights` are ranked, on clips of `data`. Its phases, and which layers
        it calls hybrid, are not read.
      out: folder of ranking.json, ranking.png and what is trained.
      choice: what to measure.

    Returns:
      The content of ranking.json: what `arl2_jax.evaluation.ranking.rank` returns, with "seconds",
      "exchange" (outcomes under each layer's exchange, or None) and "config".

    Raises:
      ConfigError: before anything is compiled, one line naming what is wrong and the remedy.
    """
    measures, by = chosen_measures(config, choice)
    config = all_hybrid(config, out)
    check_ranking(config, choice, measures)
    folder, data, params = prepare(config, remedy="name another folder with --out")
    mesh = sharding.make_mesh(config.train.mesh)
    converted = convert(config, folder, data, params)
    assert converted.stage1 is not None  # the only phase
    candidates = Candidates(config, converted.stage1, data, folder, mesh)
    values, details = {}, {"exchange": None}
    seconds = {"stage1": converted.seconds["stage1"] + converted.compile_seconds["stage1"]}
    for name in measures:
        began = time.perf_counter()
        logging.info("ranking %d layers by %s", len(candidates.layers), MEASURES[name].title)
        values[name], found = _measure(name, candidates, choice)
        details |= found
        seconds[name] = time.perf_counter() - began
    found = rank(values, by, choice.share) | {"seconds": seconds} | details
    ranking = as_json(found | {"config": to_config_dict(config)})
    if jax.process_index() == 0:
        content = json.dumps(ranking, indent=2, allow_nan=False) + "\n"
        write_whole(folder / "ranking.json", content.encode())
        write_whole(folder / "ranking.png", ranking_picture(ranking))
    return ranking


def _measure(
    name: str, candidates: Candidates, choice: RankChoice
) -> tuple[Sequence[float], dict[str, Any]]:
    """A value for every layer, and what else is known."""
    if name == "swap_after_stage2":
        # Training sets the mesh by itself.
        students = train_alone(candidates, choice.stage2_steps)
        measure: Callable[..., Any] = functools.partial(errors_alone, students)
    else:
        measure = {
            "layer_error": layer_errors,
            "retention": retentions,
            "swap": swaps,
            "exchange": flips,
        }[name]
    with jax.set_mesh(candidates.mesh):
        found = measure(candidates)
    values, details = (
        ([found[i]["flip"] for i in candidates.layers], {"exchange": found})
        if name == "exchange"
        else (found, {})
    )
    if not np.isfinite(values).all():
        raise ConfigError(
            f"stage1.learning_rate={candidates.config.stage1.learning_rate}: {name} is not finite "
            "in some layers, training has diverged; lower it"
        )
    return values, details
