"""All results of the study in one file, with a summary."""

import collections
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from arl2_jax.errors import ConfigError
from arl2_jax.evaluation.ranking import MEASURES
from arl2_jax.evaluation.recall import wilson
from arl2_jax.json_trees import differences
from arl2_jax.storage import write_whole
from study.recipes import variants
from study.stored import Folder

_ASKED = (
    "Do the states of a hybrid carry identity at true token density (blocks of 1600 tokens, heads "
    "of 128), over how many blocks, and which layers need softmax?"
)
_TIMED = (
    "seconds of a phase: its optimizer steps with their data, compilation apart; seconds_all: the "
    "whole run; seconds_a_block: generation of a block of all videos of a rollout together, with "
    "decoding and reading"
)
# Measured loss of a swap, which cheap measures shall foretell.
_LOSS = "swap_after_stage2"


def collect(folder: Folder, path: str) -> None:
    """Add the results of a folder to a file of merged ones; create the file if there is none.

    Raises:
      ConfigError: the folder has no results, or the file does not hold merged results.
    """
    files = sorted(folder.results.glob("*.json"))
    if not files:
        raise ConfigError(f"out={folder.path} has no results; run the study there first")
    runs = {file.stem: json.loads(file.read_text()) for file in files}
    merged = merge(runs, _read_merged(Path(path)))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(merged, indent=1, allow_nan=False) + "\n"
    write_whole(epath.Path(path), content.encode())
    logging.info(
        "%s has %d runs, %d of them added or replaced", path, len(merged["runs"]), len(runs)
    )


def _read_merged(path: Path) -> dict[str, Any] | None:
    """Merged results, None where there is no file."""
    if not path.exists():
        return None
    try:
        merged = json.loads(path.read_text())
    except ValueError:
        merged = None
    if not isinstance(merged, dict) or not {"runs", "config"} <= merged.keys():
        raise ConfigError(
            f"result={path} does not hold merged results; give another path, or remove the file"
        )
    return merged


def merge(
    runs: Mapping[str, dict[str, Any]], before: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One tree of all results.

    Args:
      runs: by name, as they were written.
      before: an earlier result of this function to add to. A run replaces one of the same name.

    Returns:
      "asked", "timed", "runs" (each with its device and versions, and with "changes" to the
      configuration instead of all of it), "config" (the one that "changes" refer to) and
      "summary" of `summarize`.
    """
    common = before["config"] if before else next(iter(runs.values()))["config"]
    shortened = dict(before["runs"]) if before else {}
    for name, run in runs.items():
        rest = {key: value for key, value in run.items() if key != "config"}
        shortened[name] = rest | {"changes": differences(common, run["config"])}
    shortened = dict(sorted(shortened.items()))
    return {
        "asked": _ASKED,
        "timed": _TIMED,
        "summary": summarize(shortened),
        "config": common,
        "runs": shortened,
    }


def summarize(runs: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds.

    Returns:
      "models": variant or "teacher" -> what `_pooled` returns; "rollouts": the same -> drift by
      part, pooled; "long_recall": the same -> recall in true videos by stretch, pooled; "spearman":
      measure -> correlation with the measured loss of the swap, of every run and its mean.
    """
    groups: dict[str, list] = collections.defaultdict(list)
    rollouts: dict[str, list] = collections.defaultdict(list)
    long: dict[str, list] = collections.defaultdict(list)
    rankings = []
    for run in runs.values():
        title = run.get("variant") or "teacher"
        match run["kind"]:
            case "teacher" | "conversion":
                groups[title].append(run)
            case "rollout":
                rollouts[title].append(run)
            case "long_recall":
                long[title].append(run)
            case "ranking":
                rankings.append(run)
    order = ["teacher", *variants()]
    by_order = lambda groups: {name: groups[name] for name in order if name in groups}
    return {
        "models": {name: _pooled(found) for name, found in by_order(groups).items()},
        "rollouts": {name: _drift(found) for name, found in by_order(rollouts).items()},
        "long_recall": {name: _long_recall(found) for name, found in by_order(long).items()},
        "spearman": _spearman(rankings),
    }


def _pooled(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Recall, exchange, loss and error of the runs of one variant, clips of all together."""
    lags = sorted({int(lag) for run in found for lag in run["recall_by_lag"]})
    by_lag = {}
    for lag in lags:
        rows = [row for run in found if (row := run["recall_by_lag"].get(str(lag)))]
        by_lag[lag] = _together([(row["recall"], row["clips"]) for row in rows])
    clips = [run["clips"] for run in found]
    mean = lambda values: float(np.mean(values)) if values else None
    exchange: dict[str, Any] = {}
    for name in ("none", "states", "caches", "zeroed"):
        rows = [run["exchange"].get(name) for run in found]
        if all(rows):
            exchange[name] = {
                outcome: _together([(row[outcome], n) for row, n in zip(rows, clips, strict=True)])
                for outcome in ("own", "twin", "other", "nothing")
            }
    carried = {
        kind: mean([c for run in found if (c := run["exchange"]["carried"][kind]) is not None])
        for kind in ("states", "caches")
    }
    return {
        "seeds": [[run["teacher"], run["seed"]] for run in found],
        "recall": _together([(run["recall"]["recall"], run["clips"]) for run in found]),
        "recall_of_seeds": [run["recall"]["recall"] for run in found],
        "recall_by_lag": by_lag,
        "baseline": mean([run["baseline"] for run in found]),
        "exchange": exchange,
        "carried": carried,
        "loss": [run["loss"] for run in found],
        "error": [run["errors"]["student"] for run in found if "errors" in run],
        "kept_over_a_block": [_kept(run) for run in found if "retention" in run],
    }


def _kept(run: dict[str, Any]) -> dict[str, list[float]]:
    """Share of a state that is left after a block, the median head of each layer."""
    return {
        name: [float(np.median(row)) for row in measures.get("retention", ())]
        for name, measures in run["retention"].items()
    }


def _together(rows: Sequence[tuple[float, int]]) -> dict[str, Any]:
    """Share and its interval of clips of several runs."""
    clips = sum(n for _, n in rows)
    share = sum(value * n for value, n in rows) / clips
    return {"share": share, "interval": wilson(share, clips), "clips": clips}


def _drift(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drift by part of the rollout, videos of all runs together; parts that all have."""
    parts, truth = [], float(np.mean([_seen(run["truth"]) for run in found]))
    for rows in zip(*(run["drift"] for run in found), strict=False):
        if len({tuple(row["blocks"]) for row in rows}) > 1:
            break
        parts.append(
            {
                "blocks": rows[0]["blocks"],
                "seen": float(np.mean([row["seen"] for row in rows])),
                "nothing": float(np.mean([row["nothing"] for row in rows])),
                "seen_in_truth": truth,
                "right": _pool(rows),
                "returns": _pool([row["returns"] for row in rows]),
                "same": _pool([row["same"] for row in rows]),
            }
        )
    return parts


def _long_recall(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Recall in true videos by stretch, videos of all runs together."""
    return [
        {"blocks": rows[0]["blocks"], "recall": _pool(rows, "recall")}
        for rows in zip(*(run["long_recall"] for run in found), strict=True)
    ]


def _pool(rows: Sequence[dict[str, Any]], share: str = "right") -> dict[str, Any] | None:
    """One share of several runs, which count by their videos; None if nothing was asked."""
    known = [(row[share], row["videos"]) for row in rows if row[share] is not None]
    return _together(known) if known else None


def _seen(parts: Sequence[dict[str, Any]]) -> float:
    """Share of lanes and blocks in which a whole sprite is seen."""
    blocks = [part["blocks"][1] - part["blocks"][0] + 1 for part in parts]
    return float(np.average([part["seen"] for part in parts], weights=blocks))


def _spearman(rankings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Correlation of each cheap measure with the measured loss of the swap."""
    found = {}
    for name in MEASURES:
        rows = [run["spearman"][name].get(_LOSS) for run in rankings if name in run["spearman"]]
        if name != _LOSS and rows:
            known = [value for value in rows if value is not None]
            found[name] = {"of_runs": rows, "mean": float(np.mean(known)) if known else None}
    return found


def markdown(summary: Mapping[str, Any]) -> str:
    """Tables of a summary: recall and exchange of all models, drift, and the ranking of layers."""
    lines = [
        "| model | runs | recall, % | lags 1 to 8, % | lags 9 to 16, % | error of x0 | loss |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, model in summary["models"].items():
        cells = [_percent(model["recall"]), *(_over(model, lags) for lags in ((1, 8), (9, 16)))]
        cells += [_mean(model["error"]), _mean(model["loss"])]
        lines.append(f"| {name} | {len(model['seeds'])} | " + " | ".join(cells) + " |")
    lines += ["", "| own / twin's / nothing, % | own memories | twin's states | twin's caches | "
              "states zeroed |", "|---|--:|--:|--:|--:|"]  # fmt: skip
    for name, model in summary["models"].items():
        cells = [_outcomes(model["exchange"].get(kind)) for kind in
                 ("none", "states", "caches", "zeroed")]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, parts in summary["rollouts"].items():
        lines += ["", f"| {name}, blocks | seen, % | right, % | come back right, % | "
                  "come back as last seen, % |", "|---|--:|--:|--:|--:|"]  # fmt: skip
        for part in parts:
            first, last = (block + 1 for block in part["blocks"])
            shares = [_percent(part[kind]) for kind in ("right", "returns", "same")]
            row = [f"{100 * part['seen']:.0f}", *shares]
            lines.append(f"| {first} to {last} | " + " | ".join(row) + " |")
    if summary["long_recall"]:
        lines += ["", "| true videos | blocks | drawn right, % |", "|---|--:|--:|"]
    for name, parts in summary["long_recall"].items():
        for part in parts:
            first, last = (block + 1 for block in part["blocks"])
            lines.append(f"| {name} | {first} to {last} | {_percent(part['recall'])} |")
    if summary["spearman"]:
        lines += ["", "| measure | Spearman's correlation with the swap's loss | of each run |",
                  "|---|--:|--:|"]  # fmt: skip
        for name, row in summary["spearman"].items():
            each = ", ".join(_signed(value) for value in row["of_runs"])
            lines.append(f"| {MEASURES[name].title} | {_signed(row['mean'])} | {each} |")
    return "\n".join(lines) + "\n"


def _percent(share: Mapping[str, Any] | None) -> str:
    if share is None:
        return "-"
    low, high = share["interval"]
    return f"{100 * share['share']:.0f} ({100 * low:.0f} to {100 * high:.0f})"


def _over(model: Mapping[str, Any], lags: tuple[int, int]) -> str:
    """The least and the mean of some lags."""
    rows = [row for lag, row in model["recall_by_lag"].items() if lags[0] <= int(lag) <= lags[1]]
    if not rows:
        return "-"
    mean, least = np.mean([r["share"] for r in rows]), min(r["share"] for r in rows)
    return f"{100 * mean:.0f}, least {100 * least:.0f}"


def _outcomes(row: Mapping[str, Any] | None) -> str:
    if not row:
        return "-"
    return " / ".join(f"{100 * row[name]['share']:.0f}" for name in ("own", "twin", "nothing"))


def _mean(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f}" if values else "-"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
