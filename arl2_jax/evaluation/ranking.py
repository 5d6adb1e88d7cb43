"""Ranking of layers by how much they need softmax, by several measures, and its table."""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from arl2_jax.evaluation.retention_plot import short

_WIDTH = 80


class Measure(NamedTuple):
    """A measure of how much a layer needs its softmax cache.

    Attributes:
      title: its name in tables and pictures.
      unit: meaning of its values.
      need: 1 if a layer with a large value needs softmax, -1 if one with a small value does.
    """

    title: str
    unit: str
    need: int


# Cheapest first.
MEASURES = {
    "layer_error": Measure("layer error", "relative squared error of the layer", 1),
    "retention": Measure("retention", "share of a state kept over a block", -1),
    "swap": Measure("swap", "relative squared error of x0", 1),
    "exchange": Measure("exchange", "share of drawings that flip", 1),
    "swap_after_stage2": Measure("stage 2 swap", "relative squared error of x0", 1),
}


def ranks(measure: str, values: Sequence[float]) -> Float[np.ndarray, "layers"]:
    """Return each layer's rank: 1 needs softmax most; equal values get their mean rank."""
    need = MEASURES[measure].need * np.asarray(values, float)
    above = np.sum(need[None] > need[:, None], axis=1)
    equal = np.sum(need[None] == need[:, None], axis=1)
    return above + (equal + 1) / 2


def spearman(one: Float[np.ndarray, "layers"], other: Float[np.ndarray, "layers"]) -> float | None:
    """Return Spearman's correlation of two rankings; None if one has all layers equal."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(one, other)[0, 1])


def hybrid_count(share: float, layers: int) -> int:
    """Return a share of the layers, rounded down: 22 of 30 for 0.75 (ARL2, section 4)."""
    return int(share * layers + 1e-9)


def rank(values: Mapping[str, Sequence[float]], by: str, share: float) -> dict[str, Any]:
    """Rank layers by every measure, and choose those to convert.

    Args:
      values: measure -> a value for every layer.
      by: the measure to choose by; among equal layers the later one keeps softmax.
      share: share of the layers to convert, see `hybrid_count`.

    Returns:
      "layers", "measures", "ranks" (1 needs softmax most), "spearman" (of each pair of measures),
      "by", "share", "order" (layers, the one that needs softmax most first), "softmax_layers"
      and "hybrid_layers"; ready for JSON.
    """
    table = {name: ranks(name, row) for name, row in values.items()}
    layers = list(range(len(table[by])))
    order = sorted(layers, key=lambda i: (table[by][i], -i))
    kept = len(layers) - hybrid_count(share, len(layers))
    return {
        "layers": layers,
        "measures": {name: list(map(float, row)) for name, row in values.items()},
        "ranks": {name: row.tolist() for name, row in table.items()},
        "spearman": {
            name: {other: spearman(row, table[other]) for other in table if other != name}
            for name, row in table.items()
        },
        "by": by,
        "share": share,
        "order": order,
        "softmax_layers": sorted(order[:kept]),
        "hybrid_layers": sorted(order[kept:]),
    }


def ranking_table(ranking: Mapping[str, Any]) -> str:
    """Write a ranking as lines of at most 80 columns, the layer that needs softmax most first.

    Args:
      ranking: what `rank` returns.
    """
    names = list(ranking["measures"])
    lines = ["layer         " + "".join(f"{MEASURES[name].title:>13}" for name in names)]
    for layer in ranking["order"]:
        kind = "softmax" if layer in ranking["softmax_layers"] else "hybrid"
        cells = [
            f"{short(ranking['measures'][name][layer])} ({ranking['ranks'][name][layer]:g})"
            for name in names
        ]
        lines.append(f"{layer:>5} {kind:<8}" + "".join(f"{cell:>13}" for cell in cells))
    notes = [
        "in brackets the rank: 1 needs softmax most; layers are in the order of "
        f"{MEASURES[ranking['by']].title}"
    ]
    title = lambda *pair: " / ".join(MEASURES[name].title for name in pair)
    pairs = [
        f"{title(one, other)} {_signed(ranking['spearman'][one][other])}"
        for one, other in itertools.combinations(names, 2)
    ]
    if pairs:
        notes.append(f"Spearman correlation of ranks: {'; '.join(pairs)}")
    wrapped = [textwrap.wrap(note, _WIDTH, subsequent_indent="  ") for note in notes]
    return "\n".join([*lines, "", *(line for note in wrapped for line in note)])


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"
