"""Pictures of the study's merged results."""

import collections
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from study.recipes import LONG

_COLORS = (
    "#3b6fd4", "#d4603b", "#2a9d6f", "#8a4fbf", "#a67c2d", "#c2417f", "#5b8c9c", "#6b6b6b",
    "#000000",
)  # fmt: skip
_OUTCOMES = {"own": "#1f9d55", "twin": "#f08c00", "other": "#d43b3b", "nothing": "#d0d0d0"}
_EXCHANGES = {
    "none": "own memories", "states": "twin's states", "caches": "twin's caches",
    "zeroed": "states zeroed",
}  # fmt: skip
_LABELS = {
    "teacher": "teacher", "all": "all layers", "p75": "75 % of the layers",
    "p50": "50 % of the layers", "control_local": "control, local",
}  # fmt: skip


def label(name: str) -> str:
    """A model's name for people."""
    short = name.removesuffix(LONG)
    if short != name:
        return f"{label(short)}, all steps"
    share, _, init = name.partition("_")
    if name in _LABELS:
        return _LABELS[name]
    if share in _LABELS:
        return f"{_LABELS[share]}, {init.replace('_', ' ')}"
    return f"all layers, {name.replace('_', ' ')}"


def recall_curves(
    models: Mapping[str, Mapping[str, Any]], names: Sequence[str], title: str
) -> bytes | None:
    """Draw recall by lag of some models, with 95 % intervals.

    Args:
      models: "models" of a summary.
      names: which of them, where they are there.
      title: over the picture.

    Returns:
      A PNG file; None if there is none of them.
    """
    shown = [name for name in names if name in models]
    if not shown:
        return None
    figure = Figure(figsize=(7.2, 4.4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for name, color in zip(shown, _COLORS, strict=False):
        rows = {int(lag): row for lag, row in models[name]["recall_by_lag"].items()}
        points = [(lag, rows[lag]["share"], rows[lag]["interval"]) for lag in sorted(rows)]
        _line(axes, points, color, label(name))
    baseline = float(100 * np.mean([models[name]["baseline"] for name in shown]))
    axes.axhline(baseline, color="#333333", linestyle="--", linewidth=1)
    axes.text(
        axes.get_xlim()[1], baseline + 1, "best blind answer", fontsize=8, ha="right", va="bottom"
    )
    axes.set_xlabel("frame blocks for which the sprite was hidden")
    _finish(axes, "drawn right, %", title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _png(figure)


def exchange_bars(models: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> bytes | None:
    """Draw what models draw with each kind of memory exchanged; as `recall_curves`."""
    bars = [
        (name, kind, models[name]["exchange"][kind])
        for name in names if name in models
        for kind in _EXCHANGES if kind in models[name]["exchange"]
    ]  # fmt: skip
    if not bars:
        return None
    figure = Figure(figsize=(7.6, 1.4 + 0.28 * len(bars)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for place, (_, _, row) in enumerate(bars):
        left = 0.0
        for outcome, color in _OUTCOMES.items():
            width = 100 * row[outcome]["share"]
            axes.barh(place, width, left=left, color=color, height=0.8)
            left += width
    names_shown = [f"{label(name)}: {_EXCHANGES[kind]}" for name, kind, _ in bars]
    axes.set_yticks(range(len(bars)), labels=names_shown, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("drawings, %")
    axes.spines[["top", "right"]].set_visible(False)
    handles = [axes.barh([0], [0], color=color) for color in _OUTCOMES.values()]
    titles = ["its own sprite", "its twin's", "another", "nothing"]
    figure.legend(handles, titles, ncols=4, loc="outside upper center", frameon=False, fontsize=9)
    return _png(figure)


def drift_curves(rollouts: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes | None:
    """Draw which share of the sprites is still right, over the blocks of long rollouts.

    Solid lines: of all in sight, those that went in. Dotted: of those that come back, those that
    are as their lane showed them last.

    Args:
      rollouts: "rollouts" of a summary.

    Returns:
      A PNG file; None if there is no rollout.
    """
    if not any(rollouts.values()):
        return None
    figure = Figure(figsize=(9.6, 4.2), dpi=110, layout="constrained")
    right, seen = figure.subplots(1, 2)
    for (name, parts), color in zip(rollouts.items(), _COLORS, strict=False):
        middle = [np.sqrt((p["blocks"][0] + 1) * (p["blocks"][1] + 1)) for p in parts]
        for kind, style, text in (("right", "-", "went in"), ("same", ":", "as last seen")):
            pairs = [(m, p[kind]) for m, p in zip(middle, parts, strict=True) if p[kind]]
            points = [(m, row["share"], row["interval"]) for m, row in pairs]
            if points:
                _line(right, points, color, f"{label(name)}, {text}", style, fill=kind == "right")
        shares = [100 * p["seen"] for p in parts]
        seen.plot(middle, shares, color=color, marker="o", markersize=3, label=label(name))
        truth = 100 * np.mean([p["seen_in_truth"] for p in parts])
        seen.axhline(truth, color=color, linestyle="--", linewidth=1)
    for axes in (right, seen):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("own blocks")
    _finish(right, "sprites that are the same, %", "Identity over long rollouts")
    _finish(seen, "lanes with a sprite in full sight, %", "Sprites in sight (dashed: in truth)")
    return _png(figure)


def rollout_sheet(blocks: np.ndarray, frames: np.ndarray, given: np.ndarray) -> bytes:
    """Draw frames of a rollout as a table: a row for each video.

    Args:
      blocks: numbers of the blocks [M].
      frames: uint8 [M, videos, H, W, 3].
      given: the last given frame, uint8 [videos, H, W, 3].
    """
    columns = [given[: frames.shape[1]], *frames]
    titles = ["given", *(f"block {block}" for block in blocks)]
    size = frames.shape[1], len(columns)
    figure = Figure(figsize=(1.5 * size[1], 1.6 * size[0]), dpi=100, layout="constrained")
    for column, (title, shown) in enumerate(zip(titles, columns, strict=True)):
        for row in range(size[0]):
            axes = figure.add_subplot(*size, row * size[1] + column + 1)
            axes.imshow(shown[row], interpolation="nearest")
            axes.set_axis_off()
            if not row:
                axes.set_title(title, fontsize=9)
    return _png(figure)


def training_curves(runs: Mapping[str, Mapping[str, Any]], phase: str) -> bytes | None:
    """Draw the losses of a phase along its steps; None if no run has it.

    Args:
      runs: name -> result; those of one variant have one color.
      phase: "teacher" or "stage2".
    """
    curves = collections.defaultdict(list)
    for run in runs.values():
        if curve := run.get("curves", {}).get(phase):
            curves[run.get("variant") or "teacher"].append(curve)
    if not curves:
        return None
    figure = Figure(figsize=(9, 4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for (name, found), color in zip(curves.items(), itertools.cycle(_COLORS)):
        for i, curve in enumerate(found):
            steps, losses = ([point[field] for point in curve] for field in ("step", "loss"))
            text = None if i else f"{label(name)} ({len(found)})"
            axes.semilogy(steps, losses, color=color, linewidth=1, label=text)
    axes.set_xlabel("step")
    _finish(axes, "loss", f"Training, {phase}", shares=False)
    axes.legend(fontsize=8, edgecolor="none", loc="upper left", bbox_to_anchor=(1, 1))
    return _png(figure)


def _line(
    axes: Axes, points: Sequence, color: str, text: str, style: str = "-", *, fill: bool = True
) -> None:
    """A curve of (place, share, interval)."""
    x, shares, intervals = zip(*points, strict=True)
    if fill:
        low, high = 100 * np.array(intervals).T
        axes.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
    axes.plot(x, 100 * np.array(shares), style, color=color, marker="o", markersize=3.5, label=text)


def _finish(axes: Axes, ylabel: str, title: str, *, shares: bool = True) -> None:
    if shares:
        axes.set_ylim(0, 102)
    axes.set_ylabel(ylabel)
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=True, framealpha=0.7, edgecolor="none")


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()
