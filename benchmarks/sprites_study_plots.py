"""Pictures and tables of the study, from its merged results.

    PYTHONPATH=. python benchmarks/sprites_study_plots.py --rollouts=runs/study/pictures \
        --result=benchmarks/results/sprites_study.json --out=docs/study

writes recall_by_lag.png, ablations.png, exchange.png, drift.png, training_*.png, retention_*.png,
rollout_*.png (from the files in --rollouts) and tables.md; files without results are left out.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging
from study.collect import markdown, summarize
from study.plots import (
    drift_curves,
    exchange_bars,
    recall_curves,
    rollout_sheet,
    training_curves,
)
from study.recipes import ABLATIONS, INITS, LONGER, SHARES

from arl2_jax.evaluation.retention_plot import retention_picture

_RESULT = flags.DEFINE_string(
    "result", "benchmarks/results/sprites_study.json", "Merged results of the study."
)
_ROLLOUTS = flags.DEFINE_string("rollouts", None, "Folder with frames of the rollouts.")
_OUT = flags.DEFINE_string("out", "docs/study", "Folder to write.")
_MAIN = ["teacher", *LONGER, *(f"{share}_{init}" for init in INITS for share in SHARES)]
_WITH_RETENTION = LONGER


def main(_):
    """Draw what the results have."""
    merged, out = json.loads(Path(_RESULT.value).read_text()), Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw(merged)
    for file in sorted(Path(_ROLLOUTS.value).glob("*.npz")) if _ROLLOUTS.value else ():
        with np.load(file) as found:
            pictures[file.stem] = rollout_sheet(found["blocks"], found["frames"], found["given"])
    for name, png in pictures.items():
        if png is not None:
            (out / f"{name}.png").write_bytes(png)
    (out / "tables.md").write_text(markdown(merged["summary"]))
    logging.info("%s: %s", out, ", ".join(name for name, png in pictures.items() if png))


def draw(merged: dict[str, Any]) -> dict[str, bytes | None]:
    """Pictures by name; None where the results lack what one shows."""
    summary, runs = merged["summary"], merged["runs"]
    models = summary["models"]
    pictures = {
        "recall_by_lag": recall_curves(models, _MAIN, "Recall by lag"),
        "exchange": exchange_bars(models, _MAIN),
        "drift": drift_curves(summary["rollouts"]),
        "training_teacher": training_curves(runs, "teacher"),
        "training_stage2": training_curves(runs, "stage2"),
    }
    teachers = {run["teacher"] for run in runs.values() if run.get("variant") in ABLATIONS}
    if teachers:  # each ablation next to conversions of the same teacher
        same = {name: run for name, run in runs.items() if run["teacher"] in teachers}
        names = ["all_by_block", *ABLATIONS]
        title = "Recall by lag, all layers hybrid"
        pictures["ablations"] = recall_curves(summarize(same)["models"], names, title)
    for variant in _WITH_RETENTION:
        found = [run for run in runs.values() if run.get("variant") == variant]
        measures = next((run["retention"] for run in found if "retention" in run), None)
        if measures:
            for stage in ("untrained", "student"):
                title = f"Linear memory, {variant}, {stage}"
                picture = retention_picture(measures[stage], title)
                pictures[f"retention_{variant}_{stage}"] = picture
    return pictures


if __name__ == "__main__":
    app.run(main)
