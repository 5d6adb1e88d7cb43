"""The report's main numbers as text."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from arl2_jax.evaluation.labels import LABELS, SCORED

_WIDTH = 80
_LABEL = 20
# Label, then the keys of its loss, error, recall and memory size in the report.
_ROWS = (
    (LABELS["teacher"], "teacher_loss", "", "teacher", "teacher"),
    (LABELS["untrained"], "", "error_untrained", "", "student"),
    ("after stage 1", "", "error_stage1", "", "student"),
    (LABELS["student"], "student_loss", "error_stage2", "student", "student"),
    (LABELS["control"], "", "error_control", "control", ""),
    (LABELS["control_local"], "", "error_control_local", "control_local", ""),
)
_EXCHANGES = {
    "none": "own memories",
    "states": "twin's states",
    "caches": "twin's caches",
    "zeroed": "states zeroed",
}
_LAGS_A_LINE = 5


def summary_table(report: dict[str, Any]) -> str:
    """Format the report's main numbers as text of at most 80 columns.

    Args:
      report: what `write_report` returned, or the content of its report.json.
    """
    parts = [_models(report)]
    if report["recall"]:
        parts += [_exchange(report), *_lags(report)]
    return "\n\n".join([*parts, "\n".join(_notes(report))])


def _models(report: dict[str, Any]) -> str:
    recalled, memory = report["recall"] or {}, report["memory_bytes"]
    rows = [["", "loss", "error", "recall", "color", "shape"]]
    rows[0] += [f"{frames} frames" for frames in memory["frames"]]
    for label, loss, error, score, size in _ROWS:
        found = recalled.get(score) or {}
        sizes = memory.get(size) or [None, None]
        numbers = [_digits(report.get(loss)), _digits(report.get(error))]
        numbers += [_percent(found.get(part)) for part in ("recall", "color", "shape")]
        if any(number != "-" for number in numbers):
            rows.append([label, *numbers, *map(_size, sizes)])
    if recalled:
        rows.append(["best blind answer", "-", "-", _percent(report["baseline"]), *"----"])
    return _lines(rows, (_LABEL, 8, 8, 8, 8, 8, 10, 10))


def _exchange(report: dict[str, Any]) -> str:
    """Format what is drawn with the twin's memories, one line a model."""
    rows = [["own/twin's/nothing %", *_EXCHANGES.values()]]
    for name in SCORED:
        if scores := report["exchange"][name]:
            cells = [_outcomes(scores[exchange]) for exchange in _EXCHANGES]
            rows.append([LABELS[name], *cells])
    return _lines(rows, (_LABEL, 15, 15, 15, 15))


def _outcomes(shares: dict[str, Any] | None) -> str:
    if shares is None:
        return "-"
    return " / ".join(f"{100 * shares[name]:.0f}" for name in ("own", "twin", "nothing"))


def _lags(report: dict[str, Any]) -> list[str]:
    """Format recall by lag with its interval; several tables if there are many lags."""
    by_model = {name: lags for name in SCORED if (lags := report["recall_by_lag"][name])}
    lags = sorted({lag for found in by_model.values() for lag in found}, key=int)
    tables = []
    for start in range(0, len(lags), _LAGS_A_LINE):
        own = lags[start : start + _LAGS_A_LINE]
        rows = [["recall % by lag", *(f"{lag}" for lag in own)]]
        for name, found in by_model.items():
            rows.append([LABELS[name], *(_with_interval(found.get(lag)) for lag in own)])
        tables.append(_lines(rows, (_LABEL, *[12] * len(own))))
    return tables


def _with_interval(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    low, high = (f"{100 * edge:.0f}" for edge in score["interval"])
    return f"{100 * score['recall']:.0f} ({low}-{high})"


def _lines(rows: Sequence[Sequence[str]], widths: Sequence[int]) -> str:
    return "\n".join(
        row[0].ljust(widths[0])
        + "".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    )


def _notes(report: dict[str, Any]) -> list[str]:
    """Return the meaning of the columns, and the numbers that belong to no single model."""
    notes = ["loss: flow matching; error: x0 against the teacher's; frames: size of the memory"]
    if recalled := report["recall"]:
        notes += [
            "recall: hidden sprites drawn again in the right color and shape, in "
            f"{recalled['clips']} clips drawn from {recalled['noises']} noises each",
            "twin: the same clip with another color and shape of the hidden sprite",
            "lag: frame blocks for which it was hidden; in brackets 95 % intervals (Wilson), which "
            "count clips, not drawings",
        ]
        notes += [f"{LABELS[name]}: {line}" for name in SCORED if (line := _carried(report, name))]
    if report["gap_closed"] is not None:
        notes.append(f"gap closed: {_percent(report['gap_closed'])} of the untrained error is gone")
    for key, control in (("memory_gap", "control"), ("memory_gap_local", "control_local")):
        if report[key] is not None:
            of = f"of the error of {LABELS[control]} is gone with the memory"
            notes.append(f"memory gap: {_percent(report[key])} {of}")
    if report["retention"]:
        notes.append(_kept(report["retention"]))
    seconds = [f"{phase} {value:.0f}" for phase, value in report["seconds"].items()]
    compiling = sum(report["compile_seconds"].values())
    seconds += [f"compile {compiling:.0f}", f"report {report['seconds_report']:.0f}"]
    notes.append("seconds: " + ", ".join(seconds))
    return [line for note in notes for line in textwrap.wrap(note, _WIDTH, subsequent_indent="  ")]


def _kept(retention: dict[str, Any]) -> str:
    """Return a line on how much of a state is kept, by model."""
    median = lambda table: _percent(float(np.median(table)))
    parts = []
    for name, measures in retention.items():
        lags = measures["survival"].items()
        later = ", ".join(f"{median(table)} over {lag}" for lag, table in lags if int(lag) > 1)
        label = {"stage1": "after stage 1"}.get(name, LABELS.get(name, name))
        parts.append(f"{median(measures['retention'])} {f'({later}) ' if later else ''}{label}")
    return f"a state keeps over a block (median over heads): {'; '.join(parts)}"


def _carried(report: dict[str, Any], name: str) -> str:
    """Return a line on which kind of memory carries identity; empty if unknown."""
    carried = (report["exchange"][name] or {}).get("carried", {})
    parts = [f"{kind} {_percent(share)}" for kind, share in carried.items() if share is not None]
    return f"identity follows {', '.join(parts)}" if parts else ""


def _digits(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _size(value: int | None) -> str:
    if value is None:
        return "-"
    power = min(int(math.log(max(value, 1), 1000)), 3)
    return f"{value / 1000**power:.1f} {('B', 'kB', 'MB', 'GB')[power]}"
