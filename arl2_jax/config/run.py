"""A whole run, and the rules that join its parts."""

import dataclasses

from arl2_jax.config.data import DataConfig
from arl2_jax.config.model import ModelConfig, SamplerConfig
from arl2_jax.config.rules import require
from arl2_jax.config.training import Stage1Config, Stage2Config, TeacherConfig, TrainConfig

PHASES = ("teacher", "stage1", "stage2")
CONTROLS = ("zero", "local")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """The report at the end of a run.

    Attributes:
      clips: held-out clips for the losses and errors.
      recall_clips: held-out synthetic clips for the recall test, in pairs of twins; 0 leaves it
        out.
      recall_noises: noises that each of them is drawn from.
      controls: controls to train beside the student, without its memory: "zero" holds the memory
        gate at zero, "local" lets what is trained act on the softmax inside the block (see
        model.memory_gate); () trains none.
      rollout_clips: videos made of each model; 0 leaves them out.
      rollout_length: their length as a multiple of data.frames.
    """

    clips: int = 64
    recall_clips: int = 512
    recall_noises: int = 2
    controls: tuple[str, ...] = CONTROLS
    rollout_clips: int = 2
    rollout_length: int = 4

    def __post_init__(self):
        require(self.clips > 0, "evaluation.clips", self.clips, "must be positive")
        for name in ("recall_clips", "rollout_clips", "rollout_length"):
            value = getattr(self, name)
            require(value >= 0, f"evaluation.{name}", value, "must not be negative")
        require(
            self.recall_clips % 2 == 0,
            "evaluation.recall_clips",
            self.recall_clips,
            "must be even: clips come in pairs",
        )
        require(
            self.recall_noises > 0,
            "evaluation.recall_noises",
            self.recall_noises,
            "must be positive",
            "set evaluation.recall_clips=0 to leave the recall test out",
        )
        known = len(set(self.controls)) == len(self.controls) and set(self.controls) <= {*CONTROLS}
        require(
            known,
            "evaluation.controls",
            self.controls,
            f"may have {' and '.join(CONTROLS)}, each once",
        )


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run: the teacher, its conversion in stages, and the report."""

    model: ModelConfig
    sampler: SamplerConfig = SamplerConfig()
    data: DataConfig = DataConfig()
    phases: tuple[str, ...] = PHASES
    teacher: TeacherConfig = TeacherConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self):
        self._fill_in_block_tokens()
        unknown = [p for p in self.phases if p not in PHASES]
        require(not unknown, "phases", None, f"has {unknown}", f"known are {', '.join(PHASES)}")
        in_order = [p for p in PHASES if p in self.phases]
        require(
            list(self.phases) == in_order,
            "phases",
            self.phases,
            f"must follow the order {', '.join(PHASES)}, each once",
        )
        require(
            self.data.frames % self.model.frames_per_block == 0,
            "data.frames",
            self.data.frames,
            f"must be a multiple of model.frames_per_block={self.model.frames_per_block}",
        )
        self._check_short_clips()
        stages = [p for p in self.phases if p != "teacher"]
        require(
            not stages or bool(self.model.converted_layers),
            "phases",
            self.phases,
            "convert layers, but model.hybrid_layers is empty",
            "name some",
        )
        # A closed gate, as the control has it, leaves nothing to fit.
        fits = self.stage1.start == "least_squares" and self.model.memory_gate != "zero"
        readable = self.model.memory_gate == "learned" and self.model.delta.read == "block"
        require(
            not fits or readable,
            "stage1.start",
            "least_squares",
            "fits reads of the state before a block through the learned gate, not "
            f"model.memory_gate={self.model.memory_gate} with "
            f"model.delta.read={self.model.delta.read}",
            "set stage1.start=random",
        )
        for axis, latents in (("height", self.latent_shape[0]), ("width", self.latent_shape[1])):
            patch = self.model.patch_size[1 if axis == "height" else 2]
            require(
                latents % patch == 0,
                f"data.{axis}",
                None,
                f"gives {latents} latents, not a multiple of the patch {patch} in model.patch_size",
                "change it",
            )

    def _check_short_clips(self) -> None:
        short, block = self.data.short.frames, self.model.frames_per_block
        phases = [p for p in self.phases if getattr(self, p).short_steps]
        require(
            not phases or bool(short),
            f"{phases and phases[0]}.short_steps",
            None,
            "needs clips of data.short.frames frames, which is 0",
            "set it, such as data.frames / 3",
        )
        require(
            not short or (short % block == 0 and self.data.frames % short == 0),
            "data.short.frames",
            short,
            f"must be a multiple of model.frames_per_block={block} that divides "
            f"data.frames={self.data.frames}",
        )

    def _fill_in_block_tokens(self) -> None:
        """Let the clips say how many tokens a block has, where the model does not."""
        if self.model.memory_init == "by_block" and self.model.delta.block_tokens == 0:
            tokens = self.model.frames_per_block * self.tokens_per_frame
            delta = dataclasses.replace(self.model.delta, block_tokens=tokens)
            object.__setattr__(self, "model", dataclasses.replace(self.model, delta=delta))

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


def short_run(config: Config, phase: str) -> Config:
    """The run that a phase's steps on short clips belong to.

    Args:
      config: a run with data.short.frames.
      phase: "teacher", "stage1" or "stage2"; its batches grow to as many frames.
    """
    data, settings = config.data, getattr(config, phase)
    sprites = dataclasses.replace(data.sprites, pause=data.short.pause)
    size = settings.batch_size * (data.frames // data.short.frames)
    changes = {"batch_size": size, "short_steps": 0}
    if phase == "stage1":
        changes["start"] = "random"  # its start is behind it
    return dataclasses.replace(
        config,
        data=dataclasses.replace(data, frames=data.short.frames, sprites=sprites),
        **{phase: dataclasses.replace(settings, **changes)},
    )
