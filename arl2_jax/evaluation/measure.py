"""Measures of a run's models for the report: losses, errors, recall and exchanges."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from absl import logging

from arl2_jax import models
from arl2_jax.config import Config
from arl2_jax.config.run import CONTROLS
from arl2_jax.data import ClipData
from arl2_jax.diffusion import noise_levels
from arl2_jax.evaluation.exchange import Drawings, draw_test, exchange_scores
from arl2_jax.evaluation.gap import Model, held_out_losses, teacher_errors
from arl2_jax.evaluation.labels import SCORED
from arl2_jax.evaluation.recall import (
    RecallTest,
    best_blind_answer,
    recall,
    recall_by_lag,
)
from arl2_jax.evaluation.recall_sheet import SHEET_PAIRS
from arl2_jax.training.pipeline import Converted, control_name

_PER_MODEL = ("recall", "recall_by_lag", "exchange")


def models_of(config: Config, converted: Converted) -> dict[str, Model]:
    """Return the run's models; "student" is the last hybrid that was trained."""
    params = models.teacher_params(converted.untrained, config.model)
    teacher = Model(params, config.model.teacher())
    if not config.model.converted_layers:
        return {"teacher": teacher}
    trained = [p for p in (converted.stage2, converted.stage1) if p is not None]
    hybrids = {
        "untrained": converted.untrained,
        "stage1": converted.stage1,
        "stage2": converted.stage2,
        "student": trained[0] if trained else None,
    }
    found = {name: Model(p, config.model) for name, p in hybrids.items() if p is not None}
    for gate in CONTROLS:
        params = getattr(converted, control_name(gate))
        if params is not None:
            closed = dataclasses.replace(config.model, memory_gate=gate)
            found[control_name(gate)] = Model(params, closed)
    return {"teacher": teacher} | found


def measure_gap(config: Config, data: ClipData, found: Mapping[str, Model], key) -> dict[str, Any]:
    """Compute losses of teacher and student, and the hybrids' errors against the teacher.

    Args:
      config: the run.
      data: its clips.
      found: its models.
      key: random key.

    Returns:
      A part of the report.
    """
    logging.info("report: losses and errors on %d held-out clips", config.evaluation.clips)
    clips, sampler = data.held_out(config.evaluation.clips), config.sampler
    loss = {
        name: held_out_losses(*found[name], clips, sampler, key) if name in found else None
        for name in ("teacher", "student")
    }
    compared = ("untrained", "stage1", "stage2", "control", "control_local")
    students = {name: found[name] for name in compared if name in found}
    errors = {}
    if students:
        errors = teacher_errors(students, found["teacher"], clips, sampler, key)
    mean = {name: errors[name].mean if name in errors else None for name in compared}

    def gone(name: str) -> float | None:
        """Return the share of a model's error that the converted hybrid does not have."""
        converted, other = mean["stage2"], mean[name]
        return 1 - converted / other if other and converted is not None else None

    return {
        "teacher_loss": loss["teacher"],
        "student_loss": loss["student"],
        **{f"error_{name}": value for name, value in mean.items()},
        "gap_closed": gone("untrained"),
        "memory_gap": gone("control"),
        "memory_gap_local": gone("control_local"),
        "errors_by_timestep": {
            "timesteps": 1000 * noise_levels(sampler),
            **{name: error.by_timestep for name, error in errors.items()},
        },
        "clips": len(clips["latents"]),
    }


def recall_reason(config: Config) -> str | None:
    """Return why a run has no recall test; None if it has one."""
    if config.data.source != "synthetic":
        return f"clips of data.source={config.data.source} have no ground truth of hidden objects"
    if config.evaluation.recall_clips <= 0:
        return f"evaluation.recall_clips={config.evaluation.recall_clips} leaves it out"
    return None


def draw_recall(config: Config, data: ClipData, model: Model, test: RecallTest, key) -> Drawings:
    """Draw the recall test with a model, and keep the frames that its picture shows."""
    codec = data.codec
    assert codec is not None  # synthetic clips have one
    logging.info("report: %d clips drawn from memory", len(test.clips))
    return draw_test(config, codec, model, test, key, kept=2 * SHEET_PAIRS)


def recall_scores(
    config: Config, test: RecallTest | None, drawn: Mapping[str, Drawings]
) -> dict[str, Any]:
    """Score recall of hidden sprites, also by lag and by exchange: a part of the report.

    Args:
      config: the run.
      test: the clips; None if the run has no such test, then all scores are None.
      drawn: name of the model -> its drawings.
    """
    if test is None:
        return dict.fromkeys((*_PER_MODEL, "baseline")) | {"recall_reason": recall_reason(config)}
    sprites, identities = config.data.sprites, test.identities
    scores: dict[str, Any] = {name: dict.fromkeys(SCORED) for name in _PER_MODEL}
    for name, drawings in drawn.items():
        own = drawings.readings["none"]
        right = (own == identities).all(axis=-1)
        scores["recall"][name] = recall(own, identities)
        scores["recall_by_lag"][name] = recall_by_lag(right, test.lags)
        scores["exchange"][name] = exchange_scores(drawings, identities)
    scores["recall"] |= {
        "chance": 1 / (sprites.colors * sprites.shapes),
        "clips": len(test.clips),
        "noises": config.evaluation.recall_noises,
    }
    return scores | {"baseline": best_blind_answer(identities), "recall_reason": None}
