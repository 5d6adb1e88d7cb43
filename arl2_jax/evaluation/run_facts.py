"""Sizes, times and environment of a run."""

import functools
import importlib.metadata
import os
import platform
from typing import Any

import jax

from arl2_jax import models
from arl2_jax.config import Config, ModelConfig
from arl2_jax.models import Params
from arl2_jax.training.pipeline import Converted

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "arl2_jax")


def run_facts(config: Config, converted: Converted) -> dict[str, Any]:
    """Return sizes, times and environment of a run, as in report.json."""
    teacher = _count(models.teacher_params(converted.untrained, config.model))
    frames = [config.data.frames, config.data.frames * config.evaluation.rollout_length]
    student = config.model if config.model.converted_layers else None
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
    """Return the bytes of all memories for one video of `frames` latent frames."""
    size = {"batch": 1, "frames": frames, "tokens_per_frame": config.tokens_per_frame}
    memory = jax.eval_shape(functools.partial(models.init_memory, cfg, **size))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return None
