"""Configuration: frozen dataclasses, presets of released models, strict conversion.

Facts of a released model stand in the presets of `ModelConfig`; choices stand in the files under
`configs/`. Every rule is checked when an object is made, before anything is compiled.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

PHASES = ("teacher", "stage1", "stage2")


class ConfigError(ValueError):
    """A configuration that cannot be run: one line naming the field, its value and the remedy."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A causal Wan video transformer, some of whose layers remember linearly.

    The first group of fields carries the names of Wan's own config.json.

    Attributes:
      dim: model width C.
      ffn_dim: inner width of the feed-forward network.
      freq_dim: number of sinusoidal timestep features.
      text_dim, text_len: width and number of the text tokens.
      in_dim, out_dim: latent channels in and out.
      num_heads, num_layers: attention heads and transformer layers.
      eps: epsilon of every norm.
      patch_size: (frames, rows, columns) of latents that make one token; frames must be 1.
      hybrid_layers: indices of the layers whose memory is the gated delta state; the others keep
        the softmax cache.
      frames_per_block: latent frames denoised together.
      lora_rank, lora_alpha: low-rank updates of the hybrid layers (memory branch and FFN).
      memory_gate: "learned" is ARL2; "zero" closes the memory branch (the ablation without memory).
      dtype: compute type of activations; parameters and memory states stay float32.
      remat: what training keeps of a layer: "none" keeps everything, "dots" the results of the
        weight products, "layer" only the layer's input.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    hybrid_layers: tuple[int, ...] = ()
    frames_per_block: int = 3
    lora_rank: int = 16
    lora_alpha: float = 32.0
    memory_gate: Literal["learned", "zero"] = "learned"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "layer"] = "none"

    def __post_init__(self):
        object.__setattr__(self, "hybrid_layers", tuple(sorted(set(self.hybrid_layers))))
        for name in ("dim", "ffn_dim", "num_heads", "num_layers", "frames_per_block", "lora_rank"):
            value = getattr(self, name)
            _require(value > 0, f"model.{name}={value} must be positive")
        _require(
            self.dim % self.num_heads == 0 and self.head_dim % 2 == 0 and self.head_dim >= 6,
            f"model.dim={self.dim} over model.num_heads={self.num_heads} must give an even head "
            "dimension of at least 6; change one of them",
        )
        _require(self.freq_dim % 2 == 0, f"model.freq_dim={self.freq_dim} must be even")
        _require(
            self.patch_size[0] == 1,
            f"model.patch_size={self.patch_size} must span one latent frame; set its first entry "
            "to 1",
        )
        outside = [i for i in self.hybrid_layers if not 0 <= i < self.num_layers]
        _require(
            not outside,
            f"model.hybrid_layers has {outside}, outside 0..{self.num_layers - 1}: the model has "
            f"{self.num_layers} layers; remove them",
        )

    @property
    def head_dim(self) -> int:
        """Width D of one head."""
        return self.dim // self.num_heads

    def memory_of(self, layer: int) -> str:
        """Name of the memory that a layer uses (see `arl2_jax.memory`)."""
        return "gated_delta" if layer in self.hybrid_layers else "softmax_cache"

    def layer_runs(self) -> list[tuple[int, int]]:
        """Maximal runs [start, stop) of neighbouring layers with the same memory."""
        runs = []
        for layer in range(self.num_layers):
            if runs and self.memory_of(runs[-1][0]) == self.memory_of(layer):
                runs[-1] = (runs[-1][0], layer + 1)
            else:
                runs.append((layer, layer + 1))
        return runs

    def teacher(self) -> "ModelConfig":
        """The same model with softmax memory in every layer."""
        return dataclasses.replace(self, hybrid_layers=())

    @classmethod
    def tiny(cls, **changes: Any) -> "ModelConfig":
        """A model for tests and for the example that runs on a laptop."""
        values: dict[str, Any] = dict(
            dim=128, ffn_dim=256, num_heads=4, num_layers=3, freq_dim=64, text_dim=32, text_len=8,
            in_dim=12, out_dim=12, frames_per_block=2, lora_rank=32, lora_alpha=64.0,
            hybrid_layers=(0, 1), remat="layer",
        )  # fmt: skip
        return cls(**values | changes)

    @classmethod
    def wan1p3b(cls, **changes: Any) -> "ModelConfig":
        """Wan2.1 T2V 1.3B: 1,418,996,800 parameters; 480 x 832 pixels are 1560 tokens a frame."""
        values: dict[str, Any] = dict(
            dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, dtype="bfloat16", remat="layer"
        )
        return cls(**values | changes)

    @classmethod
    def wan14b(cls, **changes: Any) -> "ModelConfig":
        """Wan2.1 T2V 14B."""
        values: dict[str, Any] = dict(
            dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, dtype="bfloat16", remat="layer"
        )
        return cls(**values | changes)


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How a block is denoised (flow matching).

    Attributes:
      method: "few_step" predicts x0 and re-noises with fresh noise; "euler" integrates the flow.
      timesteps: the few-step list, in 0..1000 before the shift warp, falling.
      steps: number of Euler steps.
      shift: shift of the warp s' = shift s / (1 + (shift - 1) s); training draws its noise
        levels through the same warp.
      guidance: classifier-free guidance scale of the Euler sampler; 1 is off.
    """

    method: Literal["few_step", "euler"] = "few_step"
    timesteps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    steps: int = 50
    shift: float = 5.0
    guidance: float = 1.0

    def __post_init__(self):
        falling = all(a > b for a, b in zip(self.timesteps, self.timesteps[1:], strict=False))
        _require(
            len(self.timesteps) > 0
            and falling
            and 0 < self.timesteps[-1] <= self.timesteps[0] <= 1000,
            f"sampler.timesteps={self.timesteps} must fall strictly within (0, 1000]",
        )
        _require(self.steps > 0, f"sampler.steps={self.steps} must be positive")
        _require(self.shift > 0, f"sampler.shift={self.shift} must be positive")
        _require(self.guidance >= 1, f"sampler.guidance={self.guidance} must be at least 1 (off)")
        _require(
            self.guidance == 1 or self.method == "euler",
            f"sampler.guidance={self.guidance} needs sampler.method=euler: few-step models carry "
            "their guidance in the weights",
        )


@dataclasses.dataclass(frozen=True)
class SpriteConfig:
    """Procedural videos: sprites that move, bounce, and pass behind occluders.

    Attributes:
      count: sprites in a clip (drawn uniformly from this inclusive range).
      colors, shapes: how many of the palette's colours and of the shapes are in use.
      size: side of a sprite's bounding box in pixels.
      speed: range of the speed in pixels a frame.
      vertical: whether sprites also move up and down; otherwise each keeps to its own lane.
      occluders: number of occluders.
      occluder_width: width of each in pixels.
    """

    count: tuple[int, int] = (2, 2)
    colors: int = 4
    shapes: int = 3
    size: int = 5
    speed: tuple[float, float] = (3.0, 3.0)
    vertical: bool = False
    occluders: int = 1
    occluder_width: int = 14

    def __post_init__(self):
        _require(
            1 <= self.count[0] <= self.count[1],
            f"data.sprites.count={self.count} must be a rising range from at least 1",
        )
        _require(
            0 < self.speed[0] <= self.speed[1],
            f"data.sprites.speed={self.speed} must be a rising range above 0",
        )
        _require(2 <= self.colors <= 8, f"data.sprites.colors={self.colors} must be in 2..8")
        _require(1 <= self.shapes <= 5, f"data.sprites.shapes={self.shapes} must be in 1..5")
        _require(self.size >= 3, f"data.sprites.size={self.size} must be at least 3 pixels")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where clips come from.

    Attributes:
      source: "synthetic" makes sprite videos on the fly; "video" decodes a folder of video files;
        "latents" reads stored latents and text embeddings.
      path: folder of the video files or of the stored latents.
      frames: latent frames in a clip; a multiple of model.frames_per_block.
      height, width: pixels of the decoded video.
      fps: frames a second of the decoded video.
      codec: pixels <-> latents; "space_to_depth" is lossless and keeps the frame rate.
      codec_factor: rows and columns of pixels that make one latent.
      held_out: clips kept apart for evaluation.
      sprites: the procedural videos.
      workers: grain worker processes; 0 reads in the training process.
    """

    source: Literal["synthetic", "video", "latents"] = "synthetic"
    path: str = ""
    frames: int = 10
    height: int = 12
    width: int = 32
    fps: float = 8.0
    codec: Literal["space_to_depth"] = "space_to_depth"
    codec_factor: int = 2
    held_out: int = 64
    sprites: SpriteConfig = SpriteConfig()
    workers: int = 0

    def __post_init__(self):
        for name in ("frames", "height", "width", "fps", "codec_factor", "held_out"):
            value = getattr(self, name)
            _require(value > 0, f"data.{name}={value} must be positive")
        _require(self.workers >= 0, f"data.workers={self.workers} must not be negative")
        for name in ("height", "width"):
            value = getattr(self, name)
            _require(
                value % self.codec_factor == 0,
                f"data.{name}={value} must be a multiple of data.codec_factor={self.codec_factor}",
            )
        _require(
            self.source == "synthetic" or bool(self.path),
            f"data.path is empty: data.source={self.source} needs the folder to read; set it",
        )


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """One phase of training.

    Attributes:
      steps: optimizer steps.
      batch_size: clips in one optimizer step, over all devices.
      accumulation: micro-batches that a step is split into; their gradients are averaged.
      optimizer: "adamw", or "muon" for the matrices inside the layers and AdamW for the rest;
        both read the settings below, and their updates have one size.
      learning_rate: peak of the warm-up + cosine schedule.
      warmup: optimizer steps of linear warm-up.
      final_learning_rate: last value of the schedule, as a fraction of the peak.
      learning_rates: (pattern, factor) pairs; a parameter takes the factor of the first regular
        expression that is found in its path, or 1.
      weight_decay: AdamW's decoupled decay (never applied to A_log, dt_bias, biases and norms).
      b2: decay of AdamW's second moment.
      clip_norm: largest global norm of a step's gradient.
      ema_decay: decay of the averaged copy of the trained parameters, which is what the phase
        hands on; 0 hands on the parameters themselves.
    """

    steps: int = 1000
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
            _require(value > 0, f"{name}={value} must be positive in every phase")
        _require(self.steps >= 0, f"steps={self.steps} must not be negative in any phase")
        _require(
            self.batch_size % self.accumulation == 0,
            f"batch_size={self.batch_size} must be a multiple of accumulation={self.accumulation}",
        )
        _require(0 <= self.ema_decay < 1, f"ema_decay={self.ema_decay} must be in [0, 1)")


@dataclasses.dataclass(frozen=True)
class TeacherConfig(PhaseConfig):
    """The softmax model: its weights, and its own training when "teacher" is among the phases.

    Attributes:
      weights: "random" initialises; otherwise a file or folder that `load_params` reads.
      text_dropout: share of clips whose text is dropped, so that guidance has its other side.
    """

    weights: str = "random"
    text_dropout: float = 0.1


@dataclasses.dataclass(frozen=True)
class Stage2Config(PhaseConfig):
    """End-to-end distillation.

    Attributes:
      layer_loss: weight of the stage-1 loss next to the end-to-end loss.
      self_rollout: share of the steps (the last ones) whose clean context is the student's own.
    """

    layer_loss: float = 0.1
    self_rollout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _require(self.layer_loss >= 0, f"stage2.layer_loss={self.layer_loss} must not be negative")
        _require(
            0 <= self.self_rollout <= 1,
            f"stage2.self_rollout={self.self_rollout} must be a share in [0, 1]",
        )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (at most once) takes all that are left.

    Attributes:
      data: copies of the model, each with its part of the batch.
      fsdp: parts of the batch whose devices also share out the parameters.
      tensor: devices that share out heads and FFN columns.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        _require(
            all(n == -1 or n > 0 for n in sizes) and sizes.count(-1) <= 1,
            f"train.mesh={sizes} must be positive, with -1 at most once",
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
        _require(bool(self.workdir), "train.workdir is empty; name the folder to write to")
        for name in ("log_every", "checkpoint_every", "keep"):
            value = getattr(self, name)
            _require(value > 0, f"train.{name}={value} must be positive")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The report at the end of a run.

    Attributes:
      clips: held-out clips for the losses and errors.
      recall_clips: held-out synthetic clips for the recall test; 0 leaves it out.
      control: also train the control whose memory gate is held at zero.
      rollout_clips: videos made of each model; 0 leaves them out.
      rollout_length: their length as a multiple of data.frames.
    """

    clips: int = 64
    recall_clips: int = 128
    control: bool = True
    rollout_clips: int = 2
    rollout_length: int = 4

    def __post_init__(self):
        _require(self.clips > 0, f"evaluation.clips={self.clips} must be positive")
        for name in ("recall_clips", "rollout_clips", "rollout_length"):
            value = getattr(self, name)
            _require(value >= 0, f"evaluation.{name}={value} must not be negative")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run of `launch/train.py`."""

    model: ModelConfig
    sampler: SamplerConfig = SamplerConfig()
    data: DataConfig = DataConfig()
    phases: tuple[str, ...] = PHASES
    teacher: TeacherConfig = TeacherConfig()
    stage1: PhaseConfig = PhaseConfig()
    stage2: Stage2Config = Stage2Config()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        unknown = [p for p in self.phases if p not in PHASES]
        _require(not unknown, f"phases has {unknown}; known are {', '.join(PHASES)}")
        in_order = [p for p in PHASES if p in self.phases]
        _require(
            list(self.phases) == in_order,
            f"phases={self.phases} must follow the order {', '.join(PHASES)}, each once",
        )
        _require(
            self.data.frames % self.model.frames_per_block == 0,
            f"data.frames={self.data.frames} must be a multiple of "
            f"model.frames_per_block={self.model.frames_per_block}",
        )
        stages = [p for p in self.phases if p != "teacher"]
        _require(
            not stages or bool(self.model.hybrid_layers),
            f"phases={self.phases} convert layers, but model.hybrid_layers is empty; name some",
        )
        for axis, latents in (("height", self.latent_shape[0]), ("width", self.latent_shape[1])):
            patch = self.model.patch_size[1 if axis == "height" else 2]
            _require(
                latents % patch == 0,
                f"data.{axis} gives {latents} latents, not a multiple of the patch {patch} in "
                "model.patch_size; change it",
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Rows, columns and channels of one latent frame."""
        factor = self.data.codec_factor
        return self.data.height // factor, self.data.width // factor, self.model.in_dim

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one latent frame."""
        rows, columns, _ = self.latent_shape
        return rows * columns // (self.model.patch_size[1] * self.model.patch_size[2])

    @property
    def blocks(self) -> int:
        """Frame blocks in a training clip."""
        return self.data.frames // self.model.frames_per_block


def from_config_dict(tree: Mapping[str, Any]) -> Config:
    """Turns a ConfigDict (or nested dict) into a checked `Config`.

    Raises:
      ConfigError: one line naming the first field that is unknown, missing or of the wrong type.
    """
    return _build(Config, tree, "")


def to_config_dict(config: Any) -> dict[str, Any]:
    """A dataclass as a nested dict of plain values; the inverse of `from_config_dict`."""
    return dataclasses.asdict(config)


def _build(cls: type, tree: Any, path: str) -> Any:
    hints = typing.get_type_hints(cls)
    _require(
        isinstance(tree, Mapping) or hasattr(tree, "items"),
        f"{path}={tree!r} must be a group of fields",
    )
    values = dict(tree.items())
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            hint = (
                f"; did you mean {path}{close[0]}?" if close else f"; known are {', '.join(hints)}"
            )
            raise ConfigError(f"unknown config field {path}{name}{hint}")
    for field in dataclasses.fields(cls):
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        _require(
            not required or field.name in values,
            f"config field {path}{field.name} is missing; set it",
        )
    built = {name: _convert(hints[name], value, f"{path}{name}") for name, value in values.items()}
    try:
        return cls(**built)
    except ConfigError as error:
        # A rule of a phase cannot know which phase it is in.
        message = str(error)
        known = path and not message.startswith(path) and issubclass(cls, PhaseConfig)
        raise ConfigError(f"{path}{message}" if known else message) from None


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Checks a value against a field's type; lists become tuples, whole numbers floats."""
    origin = get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, f"{path}.")
    if origin is Literal:
        choices = get_args(kind)
        _require(
            value in choices, f"{path}={value!r} must be one of {', '.join(map(str, choices))}"
        )
        return value
    if origin is tuple:
        _require(
            isinstance(value, Iterable) and not isinstance(value, str | bytes),
            f"{path}={value!r} must be a sequence",
        )
        inner, items = get_args(kind), list(value)
        if len(inner) == 2 and inner[1] is Ellipsis:
            inner = (inner[0],) * len(items)
        _require(len(items) == len(inner), f"{path}={value!r} must have {len(inner)} entries")
        return tuple(
            _convert(k, v, f"{path}[{i}]")
            for i, (k, v) in enumerate(zip(inner, items, strict=True))
        )
    if isinstance(kind, types.UnionType):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    mismatch = kind is not bool and isinstance(value, bool)
    _require(
        isinstance(value, kind) and not mismatch,
        f"{path}={value!r} must be of type {kind.__name__}",
    )
    return value
