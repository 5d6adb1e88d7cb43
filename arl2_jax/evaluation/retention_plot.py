"""A picture of the retention of a model's memories: layers by heads."""

import io
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Smaller shares are negligible, and all have one color.
_LEAST = 1e-8


class _Panel(NamedTuple):
    """A heat map: measure, title, label of the color scale, and whether it is logarithmic."""

    name: str
    title: str
    label: str
    log: bool


_PANELS = (
    _Panel("retention", "Retention of a block", "share of the state that survives", True),
    _Panel("tokens", "Tokens that count at the end of a clip", "tokens", True),
    _Panel("read_to_local", "Read against local", "gated read / local", False),
    _Panel("load", "Write load of a block", "n beta / D", False),
)


def retention_picture(measures: dict[str, Any], title: str = "Linear memory") -> bytes:
    """Draw measures of all layers and heads as heat maps.

    Args:
      measures: what `arl2_jax.training.retention.retention` returns.
      title: title of the whole.

    Returns:
      A PNG file.

    Raises:
      ValueError: no layer was measured.
    """
    if not measures["layers"]:
        raise ValueError("no hybrid layer was measured; there is nothing to draw")
    layers, heads = np.shape(measures["retention"])
    size = min(max(1.2 + 0.16 * heads, 3.6), 8.0), min(max(1.0 + 0.13 * layers, 2.2), 7.0)
    figure = Figure((2 * (size[0] + 1.1), 2 * (size[1] + 0.8) + 0.6), dpi=110, layout="constrained")
    tokens, width = measures["tokens_per_block"], measures["head_dim"]
    blocks = measures["blocks_per_clip"]
    figure.suptitle(
        f"{title}: blocks of {tokens} tokens, {width} dimensions a head, clips of {blocks} blocks",
        fontsize=11,
    )
    for i, panel in enumerate(_PANELS):
        axes = figure.add_subplot(2, 2, i + 1)
        most = tokens * blocks if panel.name == "tokens" else None
        _draw(axes, panel, np.asarray(measures[panel.name], float), measures["layers"], most)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor="white")
    return file.getvalue()


def _draw(axes: Axes, panel: _Panel, values: np.ndarray, layers: list[int], most: int | None):
    """Draw one heat map; `most` is the largest value that a count can have."""
    if panel.name == "retention":
        norm = LogNorm(_LEAST, 1)
    elif panel.log:
        norm = LogNorm(1, max(most or 1, 2))
    else:
        norm = Normalize(0, max(values.max(), 1e-3))
    # Zero has no logarithm: it gets the lowest color.
    shown = np.clip(values, norm.vmin, norm.vmax)
    image = axes.imshow(
        shown, norm=norm, cmap=colormaps["viridis"], aspect="auto", interpolation="nearest"
    )
    below = "min" if panel.name == "retention" else "neither"
    bar = axes.figure.colorbar(image, ax=axes, pad=0.02, aspect=25, extend=below)
    bar.set_label(panel.label, fontsize=9)
    if panel.name == "retention":
        bar.set_ticks([10.0**e for e in range(-8, 1, 2)])
    axes.set_title(panel.title, fontsize=10.5, loc="left")
    axes.set_xlabel("head", fontsize=9)
    axes.set_ylabel("layer", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    step = -(-len(layers) // 12)
    places = range(0, len(layers), step)
    axes.set_yticks(list(places), labels=[str(layers[i]) for i in places])
    if values.size <= 48:
        _write_values(axes, values, shown, norm)


def _write_values(axes: Axes, values: np.ndarray, shown: np.ndarray, norm: Normalize) -> None:
    """Write the numbers into the cells, dark on light and light on dark."""
    for (row, column), value in np.ndenumerate(values):
        light = float(norm(shown[row, column])) > 0.6
        axes.text(
            column, row, short(value), ha="center", va="center", fontsize=8,
            color="black" if light else "white",
        )  # fmt: skip


def short(value: float) -> str:
    """Format a number in at most five characters: 8e-06, 0.345, 36.6, 4680."""
    if value == 0 or not np.isfinite(value):
        return "0" if value == 0 else str(value)
    if abs(value) < 0.1:
        return f"{value:.2g}" if value >= 0.01 else f"{value:.0e}"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"
