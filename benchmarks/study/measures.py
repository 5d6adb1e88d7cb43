"""Measures of every model of the study."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from arl2_jax import models
from arl2_jax.codecs import make_codec
from arl2_jax.config import Config, ModelConfig
from arl2_jax.data import ClipData
from arl2_jax.evaluation.exchange import draw_test, exchange_scores
from arl2_jax.evaluation.gap import Model, held_out_losses, teacher_errors
from arl2_jax.evaluation.recall import RecallTest, best_blind_answer, recall, recall_by_lag
from arl2_jax.evaluation.recall import recall_test as make_recall_test
from arl2_jax.generation.exchange import exchanges_of
from arl2_jax.training.retention import retention


class Students(NamedTuple):
    """A conversion: its hybrid before training, after stage 1 (or None), and at the end."""

    untrained: Model
    stage1: Model | None
    student: Model


def recall_scores(
    config: Config, data: ClipData, model: Model, *, only: bool = False
) -> dict[str, Any]:
    """Recall, by lag and through whose memory.

    Args:
      config: the run; `evaluation` says how many clips and noises.
      data: its clips.
      model: the model.
      only: leave out the exchanges, which take most of the time.
    """
    test = recall_test(config)
    key = jax.random.key(config.train.seed)
    assert data.codec is not None  # clips that are made on the fly have one
    exchanges = ("none",) if only else exchanges_of(model.cfg)
    drawings = draw_test(config, data.codec, model, test, key, exchanges=exchanges)
    own, identities = drawings.readings["none"], test.identities
    right = (own == identities).all(axis=-1)
    return {
        "recall": recall(own, identities),
        "recall_by_lag": recall_by_lag(right, test.lags),
        "exchange": exchange_scores(drawings, identities),
        "baseline": best_blind_answer(identities),
        "clips": len(test.clips),
        "noises": config.evaluation.recall_noises,
    }


def recall_test(config: Config) -> RecallTest:
    """The recall test of a run; runs with the same clips share it."""
    return _test(config.data, config.model.frames_per_block, config.evaluation.recall_clips, config)


# The last test is kept beside a smaller one, for ablations. They are gigabytes.
_tests: dict[tuple, RecallTest] = {}


def _test(data: Any, block: int, clips: int, config: Config) -> RecallTest:
    key = (data, block, clips)
    if key not in _tests:
        if len(_tests) == 2:
            _tests.pop(next(iter(_tests)))
        codec = make_codec(config)
        assert codec is not None
        _tests[key] = make_recall_test(config, codec)
    return _tests[key]


def measure_teacher(config: Config, data: ClipData, teacher: Model) -> dict[str, Any]:
    """Recall, exchange, loss and memory of a teacher."""
    key, clips = jax.random.key(config.train.seed), data.held_out(config.evaluation.clips)
    return recall_scores(config, data, teacher) | {
        "loss": held_out_losses(*teacher, clips, config.sampler, key),
        "memory_bytes": memory_bytes(config, teacher.cfg),
    }


def measure_students(
    config: Config, data: ClipData, teacher: Model, found: Students
) -> dict[str, Any]:
    """Recall, exchange, loss, errors, retention and memory of a conversion."""
    key, clips = jax.random.key(config.train.seed), data.held_out(config.evaluation.clips)
    students = {name: model for name, model in found._asdict().items() if model is not None}
    errors = teacher_errors(students, teacher, clips, config.sampler, key)
    one, noise = data.held_out(1), config.sampler.context_noise
    kept = lambda model: retention(model.params, model.cfg, one, context_noise=noise)
    return recall_scores(config, data, found.student) | {
        "loss": held_out_losses(*found.student, clips, config.sampler, key),
        "errors": {name: error.mean for name, error in errors.items()},
        "retention": {name: kept(students[name]) for name in ("untrained", "student")},
        "memory_bytes": memory_bytes(config, found.student.cfg),
    }


def memory_bytes(config: Config, cfg: ModelConfig) -> dict[int, int]:
    """Bytes of the memories of one video, by its frame blocks."""

    def size(blocks: int) -> int:
        shape = {"frames": blocks * cfg.frames_per_block, "tokens_per_frame": tokens}
        memory = jax.eval_shape(functools.partial(models.init_memory, cfg, batch=1, **shape))
        return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(memory))

    tokens = config.tokens_per_frame
    return {blocks: size(blocks) for blocks in (config.blocks, 60, 1000)}
