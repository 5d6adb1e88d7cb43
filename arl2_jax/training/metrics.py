"""Writers of training metrics: TensorBoard, a JSON lines file, and a progress bar."""

import json
import math
import sys
from collections.abc import Mapping
from io import TextIOBase
from typing import Any, Protocol, TextIO, runtime_checkable

import jax
import numpy as np
from etils import epath
from tensorboardX import SummaryWriter
from tqdm import tqdm

from arl2_jax.storage import is_remote, write_whole

Metrics = Mapping[str, Any]


@runtime_checkable
class MetricWriter(Protocol):
    """Writer of the metrics of logged steps.

    Values are numbers or scalar jax arrays. An array over layers, "layers_4-6/error", is written as
    one number a layer, "layer_04/error" and so on. Values are fetched only when `write` is called,
    so the device runs ahead between the logged steps.
    """

    def write(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of a step."""
        ...

    def flush(self) -> None:
        """Make all written metrics visible to readers."""
        ...

    def close(self) -> None:
        """Flush and close files."""
        ...


class MultiWriter:
    """Several writers in one; device values are fetched once, together."""

    def __init__(self, *writers: MetricWriter):
        self._writers = writers

    def write(self, step: int, metrics: Metrics) -> None:
        """See `MetricWriter`."""
        if self._writers:
            values = _floats(metrics)
            for writer in self._writers:
                writer.write(step, values)

    def flush(self) -> None:
        """See `MetricWriter`."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """See `MetricWriter`."""
        for writer in self._writers:
            writer.close()


class TensorBoardWriter:
    """Scalars for TensorBoard."""

    def __init__(self, folder: epath.PathLike, *, resume_step: int | None = None):
        """Open a folder of event files.

        Args:
          folder: where the event files go.
          resume_step: last step to keep of the earlier run; TensorBoard hides the later ones. None
            hides them all.
        """
        purge = 0 if resume_step is None else resume_step + 1
        # File names have a resolution of one second; the suffix makes them unique.
        suffix = f".{purge:09d}"
        self._writer = SummaryWriter(str(folder), purge_step=purge, filename_suffix=suffix)

    def write(self, step: int, metrics: Metrics) -> None:
        """See `MetricWriter`."""
        for name, value in _floats(metrics).items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """See `MetricWriter`."""
        self._writer.flush()

    def close(self) -> None:
        """See `MetricWriter`."""
        self._writer.close()


class JsonLinesWriter:
    """One JSON object a line: {"step": 10, "loss": 0.5}; values that are not finite are null."""

    def __init__(self, path: epath.PathLike, *, resume_step: int | None = None):
        """Open a file and drop the records of an earlier run after `resume_step`.

        Args:
          path: local or remote file.
          resume_step: last step to keep of the earlier run. None keeps none.
        """
        self._path = epath.Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = _lines_up_to(self._path, resume_step)
        write_whole(self._path, "".join(lines).encode())
        # Object stores cannot append: there every flush rewrites the whole file.
        remote = is_remote(self._path)
        self._lines = lines if remote else None
        self._file = None if remote else self._path.open("a")

    def write(self, step: int, metrics: Metrics) -> None:
        """See `MetricWriter`."""
        values = {n: v if math.isfinite(v) else None for n, v in _floats(metrics).items()}
        line = json.dumps({"step": step, **values}) + "\n"
        if self._file is not None:
            self._file.write(line)
            self._file.flush()
        elif self._lines is not None:
            self._lines.append(line)

    def flush(self) -> None:
        """See `MetricWriter`."""
        if self._lines is not None:
            self._path.write_text("".join(self._lines))

    def close(self) -> None:
        """See `MetricWriter`."""
        self.flush()
        if self._file is not None:
            self._file.close()


class ProgressBar:
    """Phase, step, loss, steps per second and time left; plain lines without a terminal."""

    def __init__(
        self,
        phase: str,
        steps: int,
        *,
        start: int = 0,
        file: TextIO | TextIOBase | None = None,
        interval: float = 10.0,
    ):
        """Show a bar.

        Args:
          phase: its title.
          steps: last step of the phase.
          start: step the phase is resumed from.
          file: output stream; standard error by default.
          interval: seconds between lines if `file` is no terminal.
        """
        stream: TextIO | TextIOBase = file or sys.stderr
        terminal = stream.isatty()
        bar = " |{bar}| " if terminal else " "
        self._bar = (tqdm if terminal else _Lines)(
            desc=phase,
            total=steps,
            initial=start,
            file=stream,
            unit=" steps",
            miniters=1,
            mininterval=0.1 if terminal else interval,
            dynamic_ncols=terminal,
            bar_format="{desc} {percentage:3.0f}%"
            + bar
            + "{n_fmt}/{total_fmt}{postfix}, {rate_noinv_fmt}, {remaining} left",
        )

    def write(self, step: int, metrics: Metrics) -> None:
        """See `MetricWriter`."""
        if "loss" in metrics:
            self._bar.set_postfix_str(f"loss {float(metrics['loss']):.4g}", refresh=False)
        self._bar.update(step - self._bar.n)

    def flush(self) -> None:
        """See `MetricWriter`."""
        self._bar.fp.flush()

    def close(self) -> None:
        """See `MetricWriter`."""
        self._bar.close()


class _Lines(tqdm):
    """A bar that prints its text as a new line, at most every `mininterval` seconds."""

    _printed: int | None = None

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if self._printed != self.n:
            self._printed = int(self.n)
            print(self if msg is None else msg, file=self.fp, flush=True)

    def close(self) -> None:
        if not self.disable:
            self.disable = True
            self.display()


def _floats(metrics: Metrics) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in jax.device_get(dict(metrics)).items():
        if np.ndim(value) == 0:
            found[name] = float(value)
            continue
        layers, _, rest = name.partition("/")
        first = int(layers.removeprefix("layers_").partition("-")[0])
        found |= {f"layer_{first + i:02d}/{rest}": float(x) for i, x in enumerate(value)}
    return found


def _lines_up_to(path: epath.Path, step: int | None) -> list[str]:
    """Return the records of a file up to a step, without truncated lines."""
    if step is None or not path.exists():
        return []
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
    return kept
