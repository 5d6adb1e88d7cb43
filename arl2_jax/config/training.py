"""Settings of the training phases and of a run's output."""

import dataclasses
from typing import Literal

from arl2_jax.config.rules import require


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """One phase of training.

    Attributes:
      steps: optimizer steps.
      short_steps: the first of these steps, on data.short clips: data.frames / data.short.frames
        times as many, so that a step has the same number of frames.
      batch_size: clips in one optimizer step, over all devices.
      accumulation: micro-batches that a step is split into; their gradients are averaged.
      optimizer: "adamw", or "muon" for the matrices inside the layers and AdamW for the rest;
        both use the settings below, and their updates have the same scale.
      learning_rate: peak of the warm-up + cosine schedule.
      warmup: optimizer steps of linear warm-up.
      final_learning_rate: last value of the schedule, as a fraction of the peak.
      learning_rates: (pattern, factor) pairs; a parameter takes the factor of the first regular
        expression that matches in its path, or 1.
      weight_decay: AdamW's decoupled decay (never applied to A_log, dt_bias, biases and norms).
      b2: decay of AdamW's second moment.
      clip_norm: largest global norm of a step's gradient.
      ema_decay: decay of the averaged copy (EMA) of the trained parameters, which is the result of
        the phase; with 0 the result is the parameters themselves.
    """

    steps: int = 1000
    short_steps: int = 0
    batch_size: int = 16
    accumulation: int = 1
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    warmup: int = 20
    final_learning_rate: float = 0.05
    learning_rates: tuple[tuple[str, float], ...] = ()
    weight_decay: float = 0.01
    b2: float = 0.95
    clip_norm: float = 1.0
    ema_decay: float = 0.99

    def __post_init__(self):
        for name in ("batch_size", "accumulation", "learning_rate", "clip_norm"):
            value = getattr(self, name)
            require(value > 0, name, value, "must be positive in every phase")
        require(self.steps >= 0, "steps", self.steps, "must not be negative in any phase")
        require(
            0 <= self.short_steps <= self.steps,
            "short_steps",
            self.short_steps,
            f"must be in 0..{self.steps}, the steps of the phase",
        )
        require(
            self.batch_size % self.accumulation == 0,
            "batch_size",
            self.batch_size,
            f"must be a multiple of accumulation={self.accumulation}",
        )
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "must be in [0, 1)")


def with_steps(settings: PhaseConfig, steps: int) -> PhaseConfig:
    """Change the number of steps; those on short clips keep their share."""
    short = round(settings.short_steps * steps / max(settings.steps, 1))
    return dataclasses.replace(settings, steps=steps, short_steps=short)


@dataclasses.dataclass(frozen=True)
class TeacherConfig(PhaseConfig):
    """The softmax model: its weights, and its own training when "teacher" is among the phases.

    Attributes:
      weights: "random" initialises; otherwise a release's folder, or a file or folder that
        `load_params` reads.
      text_dropout: share of clips whose text is dropped, for classifier-free guidance.
    """

    weights: str = "random"
    text_dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class Stage1Config(PhaseConfig):
    """Distillation layer by layer.

    Attributes:
      start: what the stage begins with: "random", the initial values; "least_squares", P_q, P_v and
        the gate fitted to the teacher's attention on some clips (`arl2_jax.training.start`).
      start_clips: clips of the fit, a multiple of those in a micro-batch. The inputs of one layer
        for all of them must fit in device memory.
    """

    start: Literal["random", "least_squares"] = "random"
    start_clips: int = 64

    def __post_init__(self):
        super().__post_init__()
        clips, size = self.start_clips, self.batch_size // self.accumulation
        require(clips > 0, "stage1.start_clips", clips, "must be positive")
        require(
            self.start == "random" or clips % size == 0,
            "stage1.start_clips",
            clips,
            f"must be a multiple of the {size} clips of a micro-batch, stage1.batch_size / "
            "stage1.accumulation",
            "change one of them",
        )


@dataclasses.dataclass(frozen=True)
class Stage2Config(PhaseConfig):
    """End-to-end distillation.

    Attributes:
      layer_loss: weight of the stage-1 loss next to the end-to-end loss.
      self_rollout: share of the steps (the last ones) whose clean context the student generated.
      control_share: steps of each control as a share of the student's. Without memory there is less
        to learn; the curves of a run show whether a control still improves.
    """

    layer_loss: float = 0.1
    self_rollout: float = 0.0
    control_share: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        require(self.layer_loss >= 0, "stage2.layer_loss", self.layer_loss, "must not be negative")
        require(
            0 <= self.self_rollout <= 1,
            "stage2.self_rollout",
            self.self_rollout,
            "must be a share in [0, 1]",
        )
        require(
            0 < self.control_share <= 1,
            "stage2.control_share",
            self.control_share,
            "must be a share in (0, 1]",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (at most once) takes all remaining devices.

    Attributes:
      data: copies of the model, each with its part of the batch.
      fsdp: parts of the batch; the parameters are sharded along this axis too.
      tensor: devices over which heads and FFN columns are sharded.
      context: devices over which the frame blocks of a clip are sharded; divides their number.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        require(
            all(n == -1 or n > 0 for n in sizes) and sizes.count(-1) <= 1,
            "train.mesh",
            sizes,
            "must be positive, with -1 at most once",
        )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The run: where it writes, how often, and on which devices.

    Attributes:
      workdir: folder of the checkpoints, logs and the report.
      seed: seed of every random choice.
      log_every, checkpoint_every: in optimizer steps; the last step always does both.
      keep: checkpoints kept of each phase.
      mesh: device mesh.
    """

    workdir: str = "runs/default"
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 200
    keep: int = 2
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        require(
            bool(self.workdir), "train.workdir", None, "is empty", "name the folder to write to"
        )
        for name in ("log_every", "checkpoint_every", "keep"):
            value = getattr(self, name)
            require(value > 0, f"train.{name}", value, "must be positive")
