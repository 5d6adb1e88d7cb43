"""Metrics: what is written can be read, and a resumed run leaves no step twice."""

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2
from tqdm import tqdm

from arl2_jax.training.metrics import (
    JsonLinesWriter,
    MultiWriter,
    ProgressBar,
    TensorBoardWriter,
)


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder):
    """(step, tag, value) of every scalar, and the steps from which earlier records are purged."""
    scalars, restarts = [], []
    for file in sorted(folder.iterdir()):
        data, start = file.read_bytes(), 0
        while start < len(data):
            length = int.from_bytes(data[start : start + 8], "little")
            event = event_pb2.Event.FromString(data[start + 12 : start + 12 + length])
            start += 16 + length
            if event.HasField("session_log"):
                restarts.append(event.step)
            scalars += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    return scalars, restarts


def test_json_lines_hold_one_object_per_logged_step(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    writer = JsonLinesWriter(path)
    writer.write(10, {"loss": jnp.float32(0.5), "count": 3, "norm": jnp.bfloat16(2)})
    assert records(path) == [{"step": 10, "loss": 0.5, "count": 3.0, "norm": 2.0}]
    writer.write(20, {"loss": float("nan"), "norm": jnp.inf})
    writer.close()
    assert records(path)[1:] == [{"step": 20, "loss": None, "norm": None}]


def test_arrays_over_layers_are_one_number_a_layer(tmp_path):
    metrics = {"loss": 1.0, "layers_9-10/error": jnp.array([0.5, 0.25]), "layers_0-0/a.b": [2.0]}
    found = {"loss": 1.0, "layer_09/error": 0.5, "layer_10/error": 0.25, "layer_00/a.b": 2.0}
    path, folder = tmp_path / "metrics.jsonl", tmp_path / "tensorboard"
    writer = MultiWriter(JsonLinesWriter(path), TensorBoardWriter(folder))
    writer.write(1, metrics)
    writer.close()
    assert records(path) == [{"step": 1, **found}]
    assert {tag: value for _, tag, value in events(folder)[0]} == found


def test_a_resumed_run_leaves_no_step_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for resume_step, steps in ((None, (10, 20, 30, 40)), (20, (30, 40, 50)), (50, (60,))):
        writer = JsonLinesWriter(path, resume_step=resume_step)
        for step in steps:
            writer.write(step, {"run": steps[0]})
        # No close: the run was killed.
    assert [(r["step"], r["run"]) for r in records(path)] == [
        (10, 10), (20, 10), (30, 30), (40, 30), (50, 30), (60, 60),
    ]  # fmt: skip


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "lo')
    JsonLinesWriter(path, resume_step=20).write(30, {"loss": 2.0})
    assert [r["step"] for r in records(path)] == [10, 30]


def test_a_run_from_the_start_forgets_the_one_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0}\n')
    JsonLinesWriter(path).write(0, {"loss": 2.0})
    assert records(path) == [{"step": 0, "loss": 2.0}]


def test_tensorboard_reads_the_values_and_where_a_run_was_resumed(tmp_path):
    for resume_step, step in ((None, 10), (10, 20)):
        writer = TensorBoardWriter(tmp_path, resume_step=resume_step)
        writer.write(step, {"loss": jnp.float32(0.25)})
        writer.close()
    scalars, restarts = events(tmp_path)
    assert scalars == [(10, "loss", 0.25), (20, "loss", 0.25)]
    assert restarts[-1] == 11


def run_bar(bar, steps):
    for step in steps:
        bar.write(step, {"loss": jnp.float32(1 / step), "other": 3.0})
    bar.flush()
    bar.close()


def test_on_a_pipe_the_bar_is_a_few_plain_lines():
    pipe = io.StringIO()
    run_bar(ProgressBar("stage1", 1000, file=pipe, interval=3600), range(1, 1001))
    lines = pipe.getvalue().splitlines()
    assert len(lines) == 2 and "\r" not in pipe.getvalue()
    assert lines[0].startswith("stage1") and "0/1000" in lines[0]
    for part in ("100%", "1000/1000", "loss 0.001", "steps/s", "left"):
        assert part in lines[1]


def test_on_a_pipe_every_interval_has_a_line():
    pipe = io.StringIO()
    run_bar(ProgressBar("stage1", 1000, start=500, file=pipe, interval=0), (600, 700, 1000))
    lines = pipe.getvalue().splitlines()
    shown = [line.split()[2].rstrip(",") for line in lines]
    assert shown == ["500/1000", "600/1000", "700/1000", "1000/1000"]


def test_on_a_terminal_the_bar_stays_on_its_line(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    run_bar(ProgressBar("teacher", 3, file=terminal), (1, 2, 3))
    text = terminal.getvalue()
    assert text.count("\n") == 1 and "\r" in text
    for part in ("teacher", "3/3", "loss 0.3333", "steps/s", "left"):
        assert part in text


class Recorder:
    def __init__(self):
        self.calls = []

    def write(self, step, metrics):
        self.calls.append((step, dict(metrics)))

    def flush(self):
        self.calls.append("flush")

    def close(self):
        self.calls.append("close")


class Scalar:
    """Stands for a device array: counts how often it is fetched."""

    fetched = 0

    def __array__(self, dtype=None, copy=None):
        self.fetched += 1
        return np.float32(0.5)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_several_writers_share_one_fetch_of_the_values(count):
    writers, value = [Recorder() for _ in range(count)], Scalar()
    multi = MultiWriter(*writers)
    multi.write(3, {"loss": value})
    multi.flush()
    multi.close()
    assert all(w.calls == [(3, {"loss": 0.5}), "flush", "close"] for w in writers)
    assert value.fetched == (count > 0)
