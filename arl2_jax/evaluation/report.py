"""What a run has achieved: numbers, curves, pictures and videos, in one folder."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding

from arl2_jax import models
from arl2_jax.config import Config, ModelConfig, to_config_dict
from arl2_jax.data import ClipData, Codec
from arl2_jax.data.sprites import COLORS, SHAPES, Reveal, SpriteClip, SpriteClips
from arl2_jax.diffusion import noise_levels
from arl2_jax.evaluation.gap import (
    Batch,
    held_out_losses,
    micro_batches,
    place_beside,
    teacher_errors,
)
from arl2_jax.evaluation.plots import Row, contact_sheet, curves
from arl2_jax.evaluation.recall import recall, recall_clips
from arl2_jax.generation.rollout import generate_from_clean_past, rollout
from arl2_jax.generation.video import side_by_side, timeline, write_video
from arl2_jax.models import Params
from arl2_jax.storage import write_whole
from arl2_jax.training.pipeline import Converted

LABELS = {
    "truth": "held-out truth",
    "teacher": "teacher",
    "untrained": "untrained hybrid",
    "student": "converted hybrid",
    "control": "control, gate at 0",
}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "arl2_jax")
# Clips in the picture of the recall test: the first ones, not chosen ones.
_SHEET_CLIPS = 6


class Model(NamedTuple):
    """Parameters and what they are parameters of."""

    params: Params
    cfg: ModelConfig


class Continuations(NamedTuple):
    """Held-out clips, continued by several models.

    Attributes:
      videos: name of the model, or "truth" -> uint8 [clips, F, H, W, 3].
      given: pixel frames at the start that were given.
      trained: pixel frames of a training clip.
    """

    videos: dict[str, np.ndarray]
    given: int
    trained: int


def write_report(
    config: Config, folder: epath.PathLike, data: ClipData, converted: Converted
) -> dict[str, Any]:
    """Evaluates a run on held-out clips and writes `folder/report`.

    The folder gets report.json, curves.png, contact_sheet.png, and one mp4 for each continued
    clip. What the run leaves out (a stage, the control, the recall test) is null.

    Args:
      config: the run.
      folder: its folder, in which each phase has logged its metrics.
      data: its clips.
      converted: its models.

    Returns:
      The content of report.json.
    """
    began, folder = time.perf_counter(), epath.Path(folder)
    found = _models(config, converted)
    key = jax.random.key(config.train.seed)

    # On a CPU, compilation takes one core, and small products do not fill many.
    workers = 3 if jax.default_backend() == "cpu" and jax.device_count() == 1 else 1
    layout = jax.tree.leaves(converted.untrained)[0].sharding
    with ThreadPoolExecutor(workers) as pool:
        submit = lambda part: pool.submit(_on_mesh, layout, part, config, data, found, key)
        gap, recalled, continued = submit(_gap), submit(_recall), submit(_continue).result()
    scores, sheet = recalled.result()
    if jax.process_index() == 0:
        (folder / "report").mkdir(parents=True, exist_ok=True)
        _write_pictures(config, folder, sheet, continued)
    report = gap.result() | scores | _facts(config, converted)
    report |= {"seconds_report": time.perf_counter() - began, "config": to_config_dict(config)}
    report = _plain(report)
    if jax.process_index() == 0:
        content = json.dumps(report, indent=2, allow_nan=False) + "\n"
        write_whole(folder / "report" / "report.json", content.encode())
    return report


def _on_mesh(layout: Sharding, function: Callable[..., Any], *arguments) -> Any:
    """Calls a function under the mesh of a layout, if it has one; each thread has its own."""
    mesh = layout.mesh if isinstance(layout, NamedSharding) else None
    with jax.set_mesh(mesh) if isinstance(mesh, Mesh) else contextlib.nullcontext():
        return function(*arguments)


def _models(config: Config, converted: Converted) -> dict[str, Model]:
    """The models that the run has; "student" is the last of its hybrids that was trained."""
    teacher = Model(models.without_delta(converted.untrained), config.model.teacher())
    if not config.model.hybrid_layers:
        return {"teacher": teacher}
    trained = [p for p in (converted.stage2, converted.stage1) if p is not None]
    hybrids = {
        "untrained": converted.untrained,
        "stage1": converted.stage1,
        "stage2": converted.stage2,
        "student": trained[0] if trained else None,
    }
    found = {name: Model(p, config.model) for name, p in hybrids.items() if p is not None}
    if converted.control is not None:
        closed = dataclasses.replace(config.model, memory_gate="zero")
        found["control"] = Model(converted.control, closed)
    return {"teacher": teacher} | found


def _gap(config: Config, data: ClipData, found: dict[str, Model], key) -> dict[str, Any]:
    """Losses of teacher and student, and the hybrids' errors against the teacher."""
    logging.info("report: losses and errors on %d held-out clips", config.evaluation.clips)
    clips, shift = data.held_out(config.evaluation.clips), config.sampler.shift
    loss = {
        name: held_out_losses(*found[name], clips, shift, key) if name in found else None
        for name in ("teacher", "student")
    }
    stages = ("untrained", "stage1", "stage2")
    students = {name: found[name].params for name in stages if name in found}
    teacher, errors = found["teacher"].params, {}
    if students:
        errors = teacher_errors(students, config.model, teacher, clips, config.sampler, key)
    mean = {name: errors[name].mean if name in errors else None for name in stages}
    closed = None
    if mean["untrained"] and mean["stage2"] is not None:
        closed = 1 - mean["stage2"] / mean["untrained"]
    return {
        "teacher_loss": loss["teacher"],
        "student_loss": loss["student"],
        **{f"error_{name}": value for name, value in mean.items()},
        "gap_closed": closed,
        "errors_by_timestep": {
            "timesteps": 1000 * noise_levels(config.sampler),
            **{name: error.by_timestep for name, error in errors.items()},
        },
        "clips": len(clips["latents"]),
    }


def _recall(
    config: Config, data: ClipData, found: dict[str, Model], key
) -> tuple[dict[str, Any], bytes | None]:
    """Scores of the recall test, and its picture: (part of the report, PNG or None)."""
    count, reason = config.evaluation.recall_clips, None
    if config.data.source != "synthetic":
        reason = f"nobody knows what is hidden in clips of data.source={config.data.source}"
    elif count <= 0:
        reason = f"evaluation.recall_clips={count} leaves it out"
    if reason:
        return {"recall": None, "recall_reason": reason}, None
    logging.info("report: recall of hidden sprites in %d clips", count)
    codec = data.codec
    assert codec is not None  # clips that are made on the fly have one
    clips, events, batch = recall_clips(config, codec)
    scores: dict[str, Any] = {name: None for name in ("teacher", "student", "control")}
    shown = {}
    for name in LABELS:
        if name not in found:
            continue
        # The untrained hybrid is shown, but not scored.
        count = len(clips) if name in scores else _SHEET_CLIPS
        pixels = _generate_revealed(config, codec, found[name], batch, count, key)
        shown[name] = pixels[:_SHEET_CLIPS]
        if name in scores:
            scores[name] = recall(pixels, clips, events, config)
            scores["chance"] = scores[name].pop("chance")
    scores["clips"] = len(clips)
    sheet = _recall_sheet(config, clips, events, shown)
    return {"recall": scores, "recall_reason": None}, sheet


def _generate_revealed(
    config: Config, codec: Codec, model: Model, batch: Batch, count: int, key
) -> np.ndarray:
    """At least `count` clips, every block made after its clean past: pixels in [-1, 1]."""
    made = []
    for i, (part, new) in enumerate(micro_batches(model.params, batch)):
        if sum(map(len, made)) >= count:
            break
        own = jax.random.fold_in(key, i)
        latents = generate_from_clean_past(
            model.params, model.cfg, config.sampler, part["text"], own, part["latents"]
        )
        made.append(_fetch(latents)[:new])
    return np.asarray(codec.decode(np.concatenate(made)))


def _recall_sheet(
    config: Config, clips: list[SpriteClip], events: list[Reveal], shown: dict[str, np.ndarray]
) -> bytes:
    """The revealed sprite as each model draws it, and what was given before."""
    titles, boxes, given, truth = [], [], ([], []), []
    examples = list(zip(clips, events, strict=True))[:_SHEET_CLIPS]
    for clip, event in examples:
        start = event.block * config.model.frames_per_block
        last_seen = np.flatnonzero(clip.visible[:start, event.sprite] == 1)[-1]
        given[0].append(clip.video[last_seen])
        given[1].append(clip.video[start - 1])
        truth.append(clip.video[event.frame])
        top, left = (int(edge) for edge in clip.positions[event.frame, event.sprite])
        size = config.data.sprites.size
        boxes.append((top, left, top + size, left + size))
        color, shape = clip.colors[event.sprite], clip.shapes[event.sprite]
        titles.append(f"{list(COLORS)[color]} {SHAPES[shape]}")
    rows = [
        Row("given: last seen", given[0]),
        Row("given: hidden", given[1]),
        Row(LABELS["truth"], truth, [True] * len(truth), opens=True),
    ]
    for name, pixels in shown.items():
        frames, right = [], []
        for video, (clip, event) in zip(pixels, examples, strict=True):
            frames.append(_to_uint8(video[event.frame]))
            score = recall(video[None], [clip], [event], config)
            right.append(score["recall"] == 1)
        rows.append(Row(LABELS[name], frames, right, opens=name == "teacher"))
    title = "Recall: a hidden sprite comes out again; green = colour and shape are right"
    return contact_sheet(rows, titles, title=title, boxes=boxes)


def _continue(config: Config, data: ClipData, found: dict[str, Model], key) -> Continuations | None:
    """Continues the beginning of held-out clips past the length of the training clips."""
    count = min(config.evaluation.rollout_clips, config.data.held_out)
    f, blocks = config.model.frames_per_block, config.blocks * config.evaluation.rollout_length
    if min(count, blocks) <= 0:
        return None
    codec = data.codec
    if codec is None:
        logging.info("report: no videos; data.vae names no weights that would decode them")
        return None
    frames = blocks * f
    logging.info("report: continuing %d held-out clips to %d latent frames", count, frames)
    # Enough to see how things move, and no more.
    given = min(math.ceil(config.blocks / 4), blocks - 1)
    batch = data.held_out(count)
    past = batch["latents"][:, : given * f]
    videos = {"truth": _truth(config, codec, batch["latents"], frames)}
    for name in ("teacher", "untrained", "student"):
        if name not in found:
            continue
        params, cfg = found[name]
        placed = place_beside(params, {"past": past, "text": batch["text"]})
        made = rollout(
            params,
            cfg,
            config.sampler,
            placed["text"],
            key,
            blocks=blocks - given,
            shape=config.latent_shape,
            past=placed["past"] if given else None,
        )
        latents = np.concatenate([past, _fetch(made)], axis=1)
        videos[name] = _to_uint8(np.asarray(codec.decode(latents)))
    seen = codec.pixel_frames(given * f)
    return Continuations(videos, seen, codec.pixel_frames(config.data.frames))


def _truth(config: Config, codec: Codec, latents: np.ndarray, frames: int) -> np.ndarray:
    """The clips as they are, and as they go on where that is known."""
    if config.data.source != "synthetic":
        return _to_uint8(np.asarray(codec.decode(latents)))
    source = SpriteClips(config.data, codec.pixel_frames(frames))
    return np.stack([source.held_out(i)[0] for i in range(len(latents))])


def _continuation_sheet(continued: Continuations) -> bytes:
    """Frames of the continuations: the last that is given, then ever later ones."""
    videos, given, trained = continued
    count = max(video.shape[1] for video in videos.values())
    later = np.linspace(trained, count, min(4, count // trained)).astype(int) - 1
    times = sorted({max(given - 1, 0), (given + trained) // 2, *later.tolist()})
    parts = {t: part.label for part in timeline(count, given, trained) for t in range(*part[2:])}
    rows = []
    for i in range(len(next(iter(videos.values())))):
        for name, video in videos.items():
            frames = [video[i, t] if t < video.shape[1] else None for t in times]
            rows.append(Row(LABELS[name], frames, opens=name == "truth"))
    titles = [f"frame {t + 1}: {parts[t]}" for t in times]
    return contact_sheet(rows, titles, title="Held-out clips, continued")


def _write_pictures(
    config: Config, folder: epath.Path, sheet: bytes | None, continued: Continuations | None
) -> None:
    """Writes curves, contact sheet and videos into `folder/report`, as far as there are any."""
    if sheet is None and continued is not None:
        sheet = _continuation_sheet(continued)
    pictures = {"curves": curves(folder, (*config.phases, "control")), "contact_sheet": sheet}
    for name, png in pictures.items():
        if png is not None:
            write_whole(folder / "report" / f"{name}.png", png)
    if continued is None:
        return
    for i in range(len(continued.videos["truth"])):
        videos = {LABELS[name]: video[i] for name, video in continued.videos.items()}
        frames = side_by_side(videos, given=continued.given, trained=continued.trained)
        write_video(folder / "report" / f"continued_{i:02d}.mp4", frames, config.data.fps)


def _facts(config: Config, converted: Converted) -> dict[str, Any]:
    """Sizes, times and surroundings of the run."""
    teacher = _count(models.without_delta(converted.untrained))
    frames = [config.data.frames, config.data.frames * config.evaluation.rollout_length]
    student = config.model if config.model.hybrid_layers else None
    devices = jax.devices()
    return {
        "parameters": {"teacher": teacher, "added": _count(converted.untrained) - teacher},
        "memory_bytes": {
            "frames": frames,
            "teacher": [_memory_bytes(config, config.model.teacher(), n) for n in frames],
            "student": student and [_memory_bytes(config, student, n) for n in frames],
        },
        "seconds": converted.seconds,
        "compile_seconds": converted.compile_seconds,
        "device": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "cpu_count": os.cpu_count(),
        },
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in _PACKAGES},
    }


def _count(params: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _memory_bytes(config: Config, cfg: ModelConfig, frames: int) -> int:
    """Bytes of the memories of one video of so many latent frames."""
    size = {"batch": 1, "frames": frames, "tokens_per_frame": config.tokens_per_frame}
    memory = jax.eval_shape(functools.partial(models.init_memory, cfg, **size))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None


def _fetch(x: jax.Array) -> np.ndarray:
    """An array of all processes on each host."""
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def _to_uint8(pixels) -> np.ndarray:
    return np.clip(np.rint((np.asarray(pixels) + 1) * 127.5), 0, 255).astype(np.uint8)


def _plain(tree: Any) -> Any:
    """A tree of what JSON knows; numbers that are not finite become null."""
    if isinstance(tree, dict):
        return {str(name): _plain(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple | np.ndarray):
        return [_plain(value) for value in tree]
    if isinstance(tree, np.generic):
        tree = tree.item()
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def summary_table(report: dict[str, Any]) -> str:
    """The report's main numbers as text of at most 80 columns.

    Args:
      report: what `write_report` has returned, or the content of its report.json.
    """
    recalled, memory = report["recall"] or {}, report["memory_bytes"]
    rows = [["", "loss", "error", "recall", "colour", "shape"]]
    rows[0] += [f"{frames} frames" for frames in memory["frames"]]
    for label, loss, error, score, size in _TABLE:
        found = recalled.get(score) or {}
        sizes = memory.get(size) or [None, None]
        numbers = [_digits(report.get(loss)), _digits(report.get(error))]
        numbers += [_percent(found.get(part)) for part in ("recall", "color", "shape")]
        if any(number != "-" for number in numbers):
            rows.append([label, *numbers, *map(_size, sizes)])
    if recalled:
        rows.append(["chance", "-", "-", _percent(recalled["chance"]), *"----"])
    widths = (18, 8, 8, 8, 8, 8, 11, 11)
    lines = [
        row[0].ljust(widths[0])
        + "".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
    return "\n".join([*lines, "", *_notes(report)])


# label, then where its loss, error, recall and size of memory stand in the report.
_TABLE = (
    (LABELS["teacher"], "teacher_loss", "", "teacher", "teacher"),
    (LABELS["untrained"], "", "error_untrained", "", "student"),
    ("after stage 1", "", "error_stage1", "", "student"),
    (LABELS["student"], "student_loss", "error_stage2", "student", "student"),
    (LABELS["control"], "", "", "control", ""),
)


def _notes(report: dict[str, Any]) -> list[str]:
    """What the columns mean, and the numbers that are not of one model."""
    lines = ["loss: flow matching; error: x0 against the teacher's; frames: size of the memory"]
    if report["recall"]:
        lines.append("recall: hidden sprites drawn again in the right colour and shape")
    if report["gap_closed"] is not None:
        lines.append(f"gap closed: {_percent(report['gap_closed'])} of the untrained error is gone")
    seconds = [f"{phase} {value:.0f}" for phase, value in report["seconds"].items()]
    compiling = sum(report["compile_seconds"].values())
    seconds += [f"compile {compiling:.0f}", f"report {report['seconds_report']:.0f}"]
    return lines + textwrap.wrap("seconds: " + ", ".join(seconds), 80, subsequent_indent="  ")


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
