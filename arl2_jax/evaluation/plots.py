"""Pictures of a run: its curves, and frames of its models next to each other."""

import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator

from arl2_jax.evaluation.labels import LABELS
from arl2_jax.generation.video import enlarge

Records = list[dict[str, float | None]]
Box = tuple[int, int, int, int]

_COLORS = {
    "teacher": "#3b6fd4",
    "stage1": "#2a9d6f",
    "stage2": "#d4603b",
    "converted": "#d4603b",
    LABELS["student"]: "#d4603b",
    LABELS["control"]: "#8a8a8a",
    LABELS["control_local"]: "#a67c2d",
}
_TITLES = {
    "teacher": "Teacher",
    "stage1": "Stage 1: layers alone",
    "stage2": "Stage 2: end to end",
}
# Outlines of drawings that show the clip's own sprite, or its twin's; anything else is wrong.
_OUTLINES = {"own": "#1f9d55", "twin": "#f08c00"}
_WRONG = "#d43b3b"


class Row(NamedTuple):
    """A row of a contact sheet.

    Attributes:
      label: its name.
      frames: uint8 [H, W, 3] each, or None for an empty cell.
      marks: per frame, what it shows: "own", "twin" or other; None if the row has no marks.
      opens: whether the row begins a new group.
    """

    label: str
    frames: Sequence[UInt8[np.ndarray, "height width 3"] | None]
    marks: Sequence[str] | None = None
    opens: bool = False


def curves(folder: epath.PathLike, phases: Sequence[str]) -> bytes | None:
    """Draw the metrics that the phases of a run have logged.

    Args:
      folder: the run; `folder/<phase>/metrics.jsonl` is read.
      phases: phases and controls, in the order they are shown; those without metrics are left
        out.

    Returns:
      A PNG file; None if no phase has metrics.
    """
    logged = {phase: _records(epath.Path(folder) / phase / "metrics.jsonl") for phase in phases}
    logged = {phase: records for phase, records in logged.items() if records}
    panels = _panels(logged)
    if not panels:
        return None
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.6 * columns, 3.3 * rows), dpi=110, layout="constrained")
    for i, (title, ylabel, lines) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, i + 1)
        _draw_panel(axes, title, ylabel, lines)
        if i >= len(panels) - columns:
            axes.set_xlabel("step")
    return _png(figure)


def _panels(logged: dict[str, Records]) -> list[tuple[str, str, dict]]:
    """Return (title, y label, {name: records and key of a line}) of every panel."""
    panels = []
    for phase in ("teacher", "stage1", "stage2"):
        if phase in logged:
            lines = {phase: (logged[phase], "loss")}
            controls = [name for name in ("control", "control_local") if name in logged]
            if phase == "stage2" and controls:
                lines = {"converted": lines.pop(phase)}
                lines |= {LABELS[name]: (logged[name], "loss") for name in controls}
            panels.append((_TITLES[phase], "loss", lines))
    per_layer = (
        ("stage1", "error", "Stage 1 error per layer", "relative squared error"),
        ("stage2", "gate_mean", "Stage 2 memory gate per layer", "mean gate"),
        ("stage2", "gated_memory_to_local", "Stage 2 use of memory per layer", "memory / local"),
        ("stage2", "block_decay", "Stage 2 decay over a block per layer", "share left"),
        ("stage2", "write_load", "Stage 2 write load per layer", "n beta / D"),
    )
    for phase, name, title, ylabel in per_layer:
        keys = sorted({k for r in logged.get(phase, []) for k in r if k.endswith(f"/{name}")})
        lines = {f"layer {int(k[6:].split('/')[0])}": (logged[phase], k) for k in keys}
        if lines:
            panels.append((title, ylabel, lines))
    return panels


def _draw_panel(axes: Axes, title: str, ylabel: str, lines: dict) -> None:
    colors, low, high = _line_colors(list(lines)), math.inf, 0.0
    many = len(lines) > 8
    for (name, (records, key)), color in zip(lines.items(), colors, strict=True):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        steps, values = _thinned(np.array(points, float).reshape(-1, 2)).T
        axes.plot(steps, values, color=color, label=name, linewidth=0.9 if many else 1.5)
        low, high = min(low, values.min(initial=low)), max(high, values.max(initial=high))
    if low > 0 and high > 4 * low:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=(1, 2, 5, 10), integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if many:
        scale = ScalarMappable(BoundaryNorm(np.arange(len(lines) + 1), len(lines)))
        scale.set_cmap(ListedColormap(colors))
        bar = axes.figure.colorbar(scale, ax=axes, pad=0.02, aspect=30)
        bar.minorticks_off()
        ends = [0, len(lines) - 1]
        bar.set_ticks([end + 0.5 for end in ends], labels=[list(lines)[end] for end in ends])
    elif len(lines) > 1:
        axes.legend(fontsize=8, frameon=True, framealpha=0.7, edgecolor="none")


def _thinned(points: np.ndarray) -> np.ndarray:
    """Average neighboring points, so that a long run is a line and not a band."""
    parts = np.array_split(points, min(len(points), 80) or 1)
    return np.array([part.mean(axis=0) for part in parts if len(part)]).reshape(-1, 2)


def _line_colors(names: list[str]) -> list:
    """Return the color of each line: layers follow a color map, phases have fixed colors."""
    if names[0].startswith("layer"):
        return list(colormaps["viridis"](np.linspace(0, 0.9, len(names))))
    return [_COLORS[name] for name in names]


def _records(path: epath.Path) -> Records:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def lag_curves(by_model: Mapping[str, Mapping[int, Mapping[str, Any]]], baseline: float) -> bytes:
    """Draw recall over the number of blocks for which a sprite was hidden.

    Args:
      by_model: label of the model -> lag -> "recall" and its "interval" [low, high].
      baseline: recall of the best blind answer, dashed.

    Returns:
      A PNG file.
    """
    figure = Figure(figsize=(6.4, 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for label, scores in by_model.items():
        lags = sorted(scores)
        low, high = np.array([scores[lag]["interval"] for lag in lags]).T * 100
        shares = [100 * scores[lag]["recall"] for lag in lags]
        axes.fill_between(lags, low, high, color=_COLORS[label], alpha=0.15, linewidth=0)
        axes.plot(lags, shares, color=_COLORS[label], marker="o", markersize=4, label=label)
    axes.axhline(100 * baseline, color="#333333", linestyle="--", linewidth=1)
    place = (axes.get_xlim()[1], 100 * baseline + 1)
    axes.text(*place, "best blind answer", fontsize=8, ha="right", va="bottom", color="#333333")
    axes.set_ylim(0, 100)
    axes.set_xlabel("frame blocks for which the sprite was hidden")
    axes.set_ylabel("drawn right, %")
    axes.set_title("Recall by lag, with 95 % intervals", fontsize=11, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=True, framealpha=0.7, edgecolor="none")
    return _png(figure)


def contact_sheet(
    rows: Sequence[Row],
    columns: Sequence[str],
    *,
    title: str,
    boxes: Sequence[Box] = (),
    width: int = 192,
) -> bytes:
    """Draw frames as a table.

    Args:
      rows: its rows, each with one frame a column; frames are all of one size.
      columns: titles of the columns.
      title: title of the whole.
      boxes: per column, (top, left, bottom, right) in pixels of the object that `Row.marks`
        describes; outlined in the rows that have marks: "own" green, "twin" orange, all else red.
      width: least number of columns of pixels that a frame is enlarged to.

    Returns:
      A PNG file.
    """
    size = next(frame.shape for row in rows for frame in row.frames if frame is not None)
    scale = enlarge(np.zeros((1, *size), np.uint8), width).shape[1] // size[0]
    sheet = _Sheet(rows, len(columns), size[0] * scale, size[1] * scale)
    figure = sheet.figure
    figure.text(sheet.x(sheet.gap), sheet.y(sheet.gap), title, fontsize=12, va="top")
    for column, name in enumerate(columns):
        left = sheet.left(column) + sheet.width / 2
        place = sheet.x(left), sheet.y(sheet.header - 7)
        figure.text(*place, name, fontsize=9.5, ha="center", va="bottom", color="#555555")
    for i, row in enumerate(rows):
        middle = sheet.top(i) + sheet.height / 2
        place = sheet.x(sheet.label - 10), sheet.y(middle)
        figure.text(*place, row.label, fontsize=10.5, ha="right", va="center")
        for column, frame in enumerate(row.frames):
            if frame is None:
                continue
            axes = sheet.cell(i, column)
            axes.imshow(enlarge(frame[None], size[1] * scale)[0], interpolation="nearest")
            if row.marks is not None:
                color = _OUTLINES.get(row.marks[column], _WRONG)
                _draw_box(axes, boxes[column], scale, color)
    return _png(figure)


def _draw_box(axes: Axes, box: Box, scale: int, outline: str) -> None:
    top, left, bottom, end = (scale * edge for edge in box)
    for color, width in (("white", 4.5), (outline, 2.5)):
        corner, size = (left - 4, top - 4), (end - left + 7, bottom - top + 7)
        frame = Rectangle(
            corner, *size, fill=False, edgecolor=color, linewidth=width, clip_on=False
        )
        axes.add_patch(frame)


class _Sheet:
    """Positions on a contact sheet, in pixels from the top left corner."""

    gap, header = 8, 68

    def __init__(self, rows: Sequence[Row], columns: int, height: int, width: int):
        self.height, self.width = height, width
        self.label = 28 + 8 * max(len(line) for row in rows for line in row.label.split("\n"))
        self._tops, top = [], self.header
        for row in rows:
            top += 2 * self.gap if row.opens and self._tops else 0
            self._tops.append(top)
            top += height + self.gap
        self._size = top + self.gap, self.left(columns) + self.gap
        self.figure = Figure(figsize=(self._size[1] / 100, self._size[0] / 100), dpi=100)

    def top(self, row: int) -> int:
        return self._tops[row]

    def left(self, column: int) -> int:
        return self.label + column * (self.width + self.gap)

    def x(self, pixels: float) -> float:
        return pixels / self._size[1]

    def y(self, pixels: float) -> float:
        return 1 - pixels / self._size[0]

    def cell(self, row: int, column: int) -> Axes:
        """Return axes for one frame, pixel by pixel."""
        bottom = self.y(self.top(row) + self.height)
        size = self.x(self.width), self.height / self._size[0]
        axes = self.figure.add_axes((self.x(self.left(column)), bottom, *size))
        axes.set_axis_off()
        return axes


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()
