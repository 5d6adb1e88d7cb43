"""A picture of a ranking of layers: bars for every measure."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from arl2_jax.evaluation.ranking import MEASURES

_COLORS = {"softmax": "#3b6fd4", "hybrid": "#d4603b"}


def ranking_picture(ranking: Mapping[str, Any]) -> bytes:
    """Draw the measures of all layers, one panel a measure.

    Args:
      ranking: what `arl2_jax.evaluation.ranking.rank` returns.

    Returns:
      A PNG file.
    """
    names, layers = list(ranking["measures"]), ranking["layers"]
    width = min(max(2.5 + 0.3 * len(layers), 5.0), 12.0)
    figure = Figure((width, 0.9 + 1.7 * len(names)), dpi=110, layout="constrained")
    kept = set(ranking["softmax_layers"])
    colors = [_COLORS["softmax" if layer in kept else "hybrid"] for layer in layers]
    for i, name in enumerate(names):
        axes = figure.add_subplot(len(names), 1, i + 1)
        _draw(axes, name, ranking["measures"][name], layers, colors)
    axes.set_xlabel("layer")
    labels = {"softmax": "stays softmax", "hybrid": "to be converted"}
    figure.legend(
        handles=[Patch(color=color, label=labels[kind]) for kind, color in _COLORS.items()],
        title=f"share {ranking['share']:g} by {MEASURES[ranking['by']].title}",
        loc="outside upper right", ncols=2, fontsize=8, title_fontsize=8, frameon=False,
    )  # fmt: skip
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def _draw(axes: Axes, name: str, values: list[float], layers: list[int], colors: list[str]) -> None:
    measure, heights = MEASURES[name], np.asarray(values, float)
    axes.bar(layers, heights, color=colors, width=0.8)
    positive = heights[heights > 0]
    # Errors of layers span decades; linear bars would show the largest alone.
    if len(positive) == len(heights) and positive.max() > 20 * positive.min():
        axes.set_yscale("log")
        axes.set_ylim(positive.min() / 2, positive.max() * 1.5)
    else:
        axes.set_ylim(0, max(heights.max() * 1.05, 1e-9))
    need = "large" if measure.need > 0 else "small"
    axes.set_title(f"{measure.title}: {measure.unit}; {need} needs softmax", fontsize=9, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
