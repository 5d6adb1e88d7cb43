"""The report of a run: numbers, curves, pictures and videos, in one folder."""

import contextlib
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh, NamedSharding, Sharding

from arl2_jax.config import Config, to_config_dict
from arl2_jax.data import ClipData
from arl2_jax.evaluation.continuation import (
    Continuations,
    continuation_sheet,
    continue_clips,
    write_continuations,
)
from arl2_jax.evaluation.exchange import Drawings
from arl2_jax.evaluation.gap import Model
from arl2_jax.evaluation.labels import LABELS, SCORED
from arl2_jax.evaluation.measure import (
    draw_recall,
    measure_gap,
    models_of,
    recall_reason,
    recall_scores,
)
from arl2_jax.evaluation.plots import curves, lag_curves
from arl2_jax.evaluation.recall import RecallTest, recall_test
from arl2_jax.evaluation.recall_sheet import recall_sheet
from arl2_jax.evaluation.retention import retention_of_models
from arl2_jax.evaluation.run_facts import run_facts
from arl2_jax.json_trees import plain_json
from arl2_jax.storage import write_whole
from arl2_jax.training.pipeline import Converted, control_name


def write_report(
    config: Config, folder: epath.PathLike, data: ClipData, converted: Converted
) -> dict[str, Any]:
    """Evaluate a run on held-out clips and write `folder/report`.

    The folder gets report.json, curves.png, contact_sheet.png, recall_by_lag.png, retention.png,
    and one mp4 for each continued clip. Parts that the run leaves out (a stage, a control, the
    recall test) are null.

    Args:
      config: the run.
      folder: its folder, in which each phase has logged its metrics.
      data: its clips.
      converted: its models.

    Returns:
      The content of report.json.
    """
    began, folder = time.perf_counter(), epath.Path(folder)
    found = models_of(config, converted)
    key = jax.random.key(config.train.seed)
    codec = data.codec
    test = recall_test(config, codec) if codec and not recall_reason(config) else None

    # On a CPU, compilation uses one core, and small matrix products do not use many.
    workers = 3 if jax.default_backend() == "cpu" and jax.device_count() == 1 else 1
    layout = jax.tree.leaves(converted.untrained)[0].sharding
    with ThreadPoolExecutor(workers) as pool:
        submit = lambda part, *arguments: pool.submit(_on_mesh, layout, part, *arguments)
        scored = [name for name in SCORED if name in found] if test else []
        drawn = {name: submit(draw_recall, config, data, found[name], test, key) for name in scored}
        gap = submit(measure_gap, config, data, found, key)
        retained = submit(_retention, config, data, found)
        continued = submit(continue_clips, config, data, found, key).result()
    drawn = {name: future.result() for name, future in drawn.items()}
    scores = recall_scores(config, test, drawn)
    if jax.process_index() == 0:
        (folder / "report").mkdir(parents=True, exist_ok=True)
        _write_recall(config, folder, test, drawn, scores)
        _write_pictures(config, folder, continued, sheet=test is None)
    retention, picture = retained.result()
    if picture is not None and jax.process_index() == 0:
        write_whole(folder / "report" / "retention.png", picture)
    report = gap.result() | scores | {"retention": retention or None} | run_facts(config, converted)
    report |= {"seconds_report": time.perf_counter() - began, "config": to_config_dict(config)}
    report = plain_json(report)
    if jax.process_index() == 0:
        content = json.dumps(report, indent=2, allow_nan=False) + "\n"
        write_whole(folder / "report" / "report.json", content.encode())
    return report


def _retention(config: Config, data: ClipData, found: Mapping[str, Model]):
    """Measure how much the hybrids keep of one held-out clip, and draw it."""
    hybrids = {n: found[n].params for n in ("untrained", "stage1", "student") if n in found}
    level = config.sampler.context_noise
    return retention_of_models(hybrids, config.model, data.held_out(1), context_noise=level)


def _on_mesh(layout: Sharding, function: Callable[..., Any], *arguments) -> Any:
    """Call a function under the mesh of a sharding, if any; the mesh is set per thread."""
    mesh = layout.mesh if isinstance(layout, NamedSharding) else None
    with jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext():
        return function(*arguments)


def _write_recall(
    config: Config,
    folder: epath.Path,
    test: RecallTest | None,
    drawn: dict[str, Drawings],
    scores: dict[str, Any],
) -> None:
    """Write the pictures of the recall test, if the run has one."""
    if test is None:
        return
    by_lag = {LABELS[name]: lags for name, lags in scores["recall_by_lag"].items() if lags}
    pictures = {
        "contact_sheet": recall_sheet(config, test, drawn),
        "recall_by_lag": lag_curves(by_lag, scores["baseline"]),
    }
    for name, png in pictures.items():
        write_whole(folder / "report" / f"{name}.png", png)


def _write_pictures(
    config: Config, folder: epath.Path, continued: Continuations | None, *, sheet: bool
) -> None:
    """Write the curves and the videos of the continuations, and with `sheet` their sheet."""
    controls = map(control_name, config.evaluation.controls)
    png = curves(folder, (*config.phases, *controls))
    if png is not None:
        write_whole(folder / "report" / "curves.png", png)
    if continued is None:
        return
    if sheet:
        write_whole(folder / "report" / "contact_sheet.png", continuation_sheet(continued))
    write_continuations(continued, folder / "report", config.data.fps)
