"""Long rollouts and long true videos: which sprites of the past are left."""

import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from arl2_jax.codecs import make_codec
from arl2_jax.config import Config, ModelConfig
from arl2_jax.evaluation.drift import (
    Beginnings,
    beginnings,
    drift_scores,
    read_rollout,
    true_blocks,
    true_clip,
)
from arl2_jax.evaluation.gap import Model
from arl2_jax.evaluation.lanes import lanes_of
from arl2_jax.evaluation.long_recall import Stretch, long_recall
from arl2_jax.generation.generator import Generator
from study.clock import Clock
from study.conversions import student_params, teacher_params
from study.measures import memory_bytes
from study.recipes import Job, changed, conversion_config
from study.stored import Folder

# Seconds that must be left to go on, so that what was read can be scored and stored.
_TO_STORE = 15
# Blocks of true clips that are read for comparison.
_TRUE_BLOCKS = 64
# Blocks at most of models whose caches grow.
_SOFTMAX_BLOCKS = 60
# Long recall draws the last blocks, 16 at most, of true videos of these lengths, and of the lengths
# of one and two training clips.
_LONG_RECALL_DRAWN = 16
_LONG_RECALL_BLOCKS = (60, 250, 1000)


class Rollout(NamedTuple):
    """What a long rollout shows.

    Attributes:
      measures: drift, that of the true clips, and times; for JSON.
      frames: "blocks" [M], counted from 1, "frames" uint8 [M, K, H, W, 3] of the first videos after
        them, and "given" uint8 [K, H, W, 3], the last frame that went in.
      readings: of all blocks and videos, as `arl2_jax.evaluation.drift.Readings` has them.
    """

    measures: dict[str, Any]
    frames: dict[str, np.ndarray]
    readings: Int[np.ndarray, "m n s"]


def run_rollout(
    base: Config, job: Job, folder: Folder, clock: Clock, blocks: int, videos: int, steps: int
) -> tuple[Config, dict[str, Any]]:
    """Let a model of the study continue the first third of held-out clips.

    Args:
      base, job, folder: as elsewhere; a teacher's job continues with the teacher.
      clock, blocks, videos: as `roll_out` takes them.
      steps: of the sampler.
    """
    config = changed(_config(base, job, folder), {"sampler.steps": steps})
    found = roll_out(config, _model(config, job, folder), job.seed, clock, blocks, videos)
    np.savez_compressed(
        folder.pictures / f"{job.name}.npz", readings=found.readings, **found.frames
    )
    return config, _facts(job) | found.measures


def run_long_recall(
    base: Config, job: Job, folder: Folder, blocks: int, videos: int
) -> tuple[Config, dict[str, Any]]:
    """Measure the recall of a model of the study in true videos as long as rollouts.

    Args:
      base, job, folder: as elsewhere.
      blocks: of the videos; 60 at most for models with softmax layers.
      videos: held-out ones.
    """
    config = _config(base, job, folder)
    model = _model(config, job, folder)
    return config, _facts(job) | measure_long_recall(config, model, job.seed, blocks, videos)


def measure_long_recall(
    config: Config, model: Model, seed: int, blocks: int, videos: int
) -> dict[str, Any]:
    """Measure recall early and late in true videos; returns measures for JSON.

    Args:
      config: the run.
      model: the model.
      seed: of the noise.
      blocks, videos: as in `run_long_recall`.
    """
    codec, began = make_codec(config), time.perf_counter()
    assert codec is not None  # clips that are made on the fly have one
    blocks = min(blocks, _SOFTMAX_BLOCKS) if _has_softmax(model.cfg) else blocks
    lengths = {config.blocks, 2 * config.blocks, *_LONG_RECALL_BLOCKS, blocks}
    ends = [1, *sorted(end for end in lengths if end <= blocks)]
    stretches = [
        Stretch(max(end - _LONG_RECALL_DRAWN, before), end - 1)
        for before, end in itertools.pairwise(ends)
    ]
    key = jax.random.key(seed)
    scores = long_recall(config, codec, model, key, videos=videos, stretches=stretches)
    facts = {"videos": videos, "blocks": blocks, "sampler": _sampler(config)}
    return facts | {"long_recall": scores, "seconds_long_recall": time.perf_counter() - began}


def roll_out(
    config: Config, model: Model, seed: int, clock: Clock, blocks: int, videos: int
) -> Rollout:
    """Let a model continue the first third of held-out clips, and read what it draws.

    Args:
      config: the run.
      model: the model.
      seed: of the noise.
      clock: a rollout ends early where the time does.
      blocks: to generate, at most; models with softmax layers end at 60.
      videos: to generate together.
    """
    params, cfg = model
    codec = make_codec(config)
    assert codec is not None  # clips that are made on the fly have one
    given = beginnings(config, codec, videos, max(config.blocks // 3, 1))
    softmax = _has_softmax(cfg)
    blocks = min(blocks, _SOFTMAX_BLOCKS) if softmax else blocks
    generator = Generator(cfg, params, config.sampler, latent_shape=config.latent_shape)
    stream = generator.stream(
        given.batch["text"], key=jax.random.key(seed), past=given.batch["latents"],
        frames=blocks * cfg.frames_per_block if softmax else None,
    )  # fmt: skip
    timed = _Timed(itertools.islice(stream, blocks), clock)
    kept = sorted({0, 9, 59, 249, blocks // 2 - 1, blocks - 1})
    readings = read_rollout(timed, codec, given.lanes, config.data.sprites, kept=kept)
    wanted = given.lanes.identities
    made = len(readings.identities)
    numbers = np.array(sorted(readings.frames))
    frames = {
        "blocks": numbers + 1,
        "frames": np.stack([readings.frames[i] for i in numbers]),
        "given": np.stack([clip.video[-1] for clip in given.clips[:4]]),
    }
    measures = {
        "videos": videos,
        "given_blocks": given.batch["latents"].shape[1] // cfg.frames_per_block,
        "blocks": made,
        "sampler": _sampler(config),
        "drift": drift_scores(readings.identities, wanted),
        "truth": drift_scores(_truth(config, given, min(made, _TRUE_BLOCKS)), wanted),
        "identities": wanted.tolist(),
        "first_block_seconds": timed.first,
        "seconds_a_block": timed.seconds / max(made - 1, 1),
        "memory_bytes": memory_bytes(config, cfg),
    }
    return Rollout(measures, frames, readings.identities)


def _config(base: Config, job: Job, folder: Folder) -> Config:
    """The configuration of the model that a job is of."""
    if job.variant is None:
        return base
    return conversion_config(base, job.variant, job.seed, str(folder.scratch(job.name)))


def _model(config: Config, job: Job, folder: Folder) -> Model:
    params = teacher_params(config, folder, job)
    if not job.conversion:
        return Model(params, config.model.teacher())
    return Model(student_params(params, config.model, folder, job.conversion), config.model)


def _facts(job: Job) -> dict[str, Any]:
    return {
        "kind": job.kind, "variant": job.variant, "teacher": job.teacher, "seed": job.seed,
    }  # fmt: skip


def _sampler(config: Config) -> dict[str, Any]:
    names = ("method", "steps", "shift", "context_noise")
    return {name: getattr(config.sampler, name) for name in names}


def _has_softmax(cfg: ModelConfig) -> bool:
    return len(cfg.hybrid_layers) < cfg.num_layers


def _truth(config: Config, given: Beginnings, blocks: int) -> np.ndarray:
    """Readings of the true clips as they go on: how often a sprite is in sight at all."""
    f, codec = config.model.frames_per_block, make_codec(config)
    assert codec is not None
    first = given.clips[0].video.shape[0]
    clips = [true_clip(config, i, first + blocks * f) for i in range(len(given.clips))]
    latents = map(codec.encode, true_blocks(clips, f, first))
    lanes = lanes_of(clips, config.data.sprites)
    return read_rollout(latents, codec, lanes, config.data.sprites).identities


class _Timed:
    """Blocks as they come, as long as there is time; how long they took."""

    def __init__(self, blocks: Iterator[Any], clock: Clock):
        self._blocks, self._clock = blocks, clock
        self.first = self.seconds = 0.0

    def __iter__(self) -> Iterator[Any]:
        began, block = time.perf_counter(), None
        for i, block in enumerate(self._blocks):
            if not i:
                jax.block_until_ready(block)
                self.first, began = time.perf_counter() - began, time.perf_counter()
            yield block
            if self._clock.left() < _TO_STORE:
                break
        jax.block_until_ready(block)
        self.seconds = time.perf_counter() - began
