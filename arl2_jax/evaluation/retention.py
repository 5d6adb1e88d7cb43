"""Retention of models' memories: a table, and a part of the report."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from arl2_jax.config import ModelConfig
from arl2_jax.evaluation.retention_plot import retention_picture, short
from arl2_jax.models import Params
from arl2_jax.training.retention import measured_layers, retention

# Measure and heading of each group of columns.
_COLUMNS = (
    ("retention", "retention"), ("load", "write load"), ("tokens", "tokens"),
    ("read_to_local", "read/local"),
)  # fmt: skip


def retention_of_models(
    students: Mapping[str, Params],
    cfg: ModelConfig,
    clips: Mapping[str, Any],
    *,
    context_noise: float = 0.0,
) -> tuple[dict[str, Any], bytes | None]:
    """Measure the hybrids of a run, and draw the last of them.

    Args:
      students: parameters by name, in order of training, such as "untrained" and "stage2".
      cfg: the model of all of them.
      clips: held-out clips, "latents" and "text", as `ClipData.held_out` returns them.
      context_noise: noise level at which clips are written, see `SamplerConfig`.

    Returns:
      Measures by name, ready for JSON, as `arl2_jax.training.retention.retention` returns them; and
      a PNG file, or None if there is no memory to measure.
    """
    if not students or not measured_layers(cfg):
        return {}, None
    measures = {
        name: retention(params, cfg, clips, context_noise=context_noise)
        for name, params in students.items()
    }
    name = list(measures)[-1]
    return measures, retention_picture(measures[name], f"Linear memory, {name}")


def retention_table(measures: dict[str, Any]) -> str:
    """Format measures as a table: a line per layer with median, min and max over heads.

    Args:
      measures: what `arl2_jax.training.retention.retention` returns.

    Returns:
      Lines of at most 80 columns.
    """
    heads = "".join(f"{heading:>19}" for _, heading in _COLUMNS)
    names = f"{'med.':>7}{'min':>6}{'max':>6}" * len(_COLUMNS)
    lines = [f"{'':>4}{heads}", f"layer{names[1:]}"]
    for i, layer in enumerate(measures["layers"]):
        cells = []
        for name, _ in _COLUMNS:
            row = measures[name][i]
            median, *ends = (short(float(f(row))) for f in (np.median, np.min, np.max))
            cells.append(f"{median:>7}" + "".join(f"{end:>6}" for end in ends))
        lines.append(f"{layer:>4}{''.join(cells)}")
    return "\n".join(lines)
