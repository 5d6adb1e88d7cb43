"""Ranks the layers of a softmax model by how much they need softmax, and writes the ranking."""

import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from arl2_jax import sharding
from arl2_jax.config import Config, to_config_dict
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
from arl2_jax.json_trees import as_json
from arl2_jax.storage import write_whole
from arl2_jax.training.pipeline import convert, prepare


def rank_layers(config: Config, out: epath.PathLike, choice: RankChoice) -> dict[str, Any]:
    """Rank the layers of a softmax model by how much they need softmax.

    Stage 1 converts all layers at once, with the settings of `config.stage1`; then each is
    measured. A second call with the same configuration resumes where the first stopped.

    Args:
      config: the run: `teacher.weights` are ranked, on clips of `data`. Its phases and hybrid
        layers are ignored.
      out: folder of ranking.json, ranking.png and the training.
      choice: measures, and how to choose by them.

    Returns:
      The content of ranking.json: what `arl2_jax.evaluation.ranking.rank` returns, with "seconds",
      "exchange" (what `arl2_jax.evaluation.exchange.layer_flips` returns, or None) and "config".

    Raises:
      UserError: what is wrong, in one line with the remedy, before anything is compiled.
      FloatingPointError: training has diverged.
    """
    measures, by = chosen_measures(config, choice)
    config = all_hybrid(config, out)
    check_ranking(config, choice, measures)
    folder, data, params = prepare(config)
    mesh = sharding.make_mesh(config.train.mesh)
    converted = convert(config, folder, data, params)
    assert converted.stage1 is not None  # the only phase
    candidates = Candidates(config, converted.stage1, data, folder, mesh)
    found: dict[str, Any] = {}
    seconds = {"stage1": converted.seconds["stage1"] + converted.compile_seconds["stage1"]}
    for name in measures:
        began = time.perf_counter()
        logging.info("ranking %d layers by %s", len(candidates.layers), MEASURES[name].title)
        found[name] = _measure(name, candidates, choice.stage2_steps)
        seconds[name] = time.perf_counter() - began
    exchange = found.get("exchange")
    if exchange:
        found["exchange"] = [exchange["layers"][i]["flip"] for i in candidates.layers]
        if not any(found["exchange"]):
            logging.warning(
                "no drawing flips with the cache of any one layer (recall %.1f %%): the exchange "
                "does not distinguish layers", 100 * exchange["recall"],
            )  # fmt: skip
    _check_finite(found, config)
    facts = {"seconds": seconds, "exchange": exchange, "config": to_config_dict(config)}
    ranking = as_json(rank(found, by, choice.share) | facts)
    if jax.process_index() == 0:
        content = json.dumps(ranking, indent=2, allow_nan=False) + "\n"
        write_whole(folder / "ranking.json", content.encode())
        write_whole(folder / "ranking.png", ranking_picture(ranking))
    return ranking


def _measure(name: str, candidates: Candidates, stage2_steps: int) -> Any:
    """Compute a measure for every layer."""
    measure = _MEASURES.get(name)
    if measure is None:
        # Training sets the mesh itself.
        measure = functools.partial(errors_alone, train_alone(candidates, stage2_steps))
    with jax.set_mesh(candidates.mesh):
        return measure(candidates)


_MEASURES: dict[str, Callable[[Candidates], Any]] = {
    "layer_error": layer_errors,
    "retention": retentions,
    "swap": swaps,
    "exchange": flips,
}


def _check_finite(values: Mapping[str, Sequence[float]], config: Config) -> None:
    lost = [name for name, row in values.items() if not np.isfinite(row).all()]
    if lost:
        phase = "stage2" if lost == ["swap_after_stage2"] else "stage1"
        raise FloatingPointError(
            f"{phase}.learning_rate={getattr(config, phase).learning_rate}: {', '.join(lost)} of "
            "some layers is not finite; lower it and name another folder"
        )
