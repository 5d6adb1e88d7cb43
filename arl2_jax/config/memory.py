"""Memories of layers: kinds and their settings."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from arl2_jax.config.rules import require
from arl2_jax.errors import ConfigError

if TYPE_CHECKING:
    from arl2_jax.config.model import ModelConfig

# Fields that decide what weights mean; the others set initial values.
RULE_FIELDS = ("rule", "decay", "beta_max", "read", "span")


@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """Base class of the settings of a memory kind; kinds without settings use it directly.

    Attributes:
      converts: whether conversion trains what the memory adds to a layer. Such a layer also has
        low-rank updates of its FFN.
    """

    converts: ClassVar[bool] = False

    def check(self, model: "ModelConfig") -> None:
        """Raise ConfigError if the memory does not suit a model."""

    def next_phase(self) -> "tuple[int, MemorySpec] | None":
        """Return the latent frame at which another memory takes over, and that memory, or None."""
        return None


@dataclasses.dataclass(frozen=True)
class GatedDeltaConfig(MemorySettings):
    """Initial values of the gated delta memory, and variants of its rule.

    The first group is used if `model.memory_init` is "by_block". Its constants count in blocks of n
    tokens and in heads of D dimensions, so that a state keeps the same share of the past for any n
    and D. The second group has ablations; the defaults are ARL2's. `leak` may be set for weights
    that were trained without it.

    Attributes:
      block_tokens: tokens n of a frame block; 0 takes those of the run's clips.
      time_constants: shortest and longest time in which a state decays to 1 / e, in blocks; those
        of the heads lie between them, evenly in the logarithm.
      write_load: n beta / D at the start. The writes of a block leave exp(-write_load) of a state,
        in the root mean square and for keys in random directions.
      read_gain: scale of the read at the start; P_v begins as read_gain sqrt(D) I, where sqrt(D)
        undoes the read's division by it.
      rule: "delta" replaces the value of a key; "additive" adds to it (gated linear attention).
      decay: "learned", or "none" (g = 0).
      beta_max: largest strength of a write, in (0, 2]; above 1 a write may reverse a direction.
      read: "block" reads the state before the block; "token" reads the state after the token,
        with the earlier tokens of the block.
      span: "video" keeps the state from block to block; "block" begins every block with the
        previous block alone.
      leak: share of a state, in [0, 1), that every block loses in addition to decay and writes;
        ARL2 has 0. Heads that training leaves without decay fill up in videos far longer than its
        clips, and then remember less; in the study a leak of 0.02 prevents that (docs/study.md).
    """

    converts: ClassVar[bool] = True

    block_tokens: int = 0
    time_constants: tuple[float, float] = (0.5, 200.0)
    write_load: float = 0.15
    read_gain: float = 0.3

    rule: Literal["delta", "additive"] = "delta"
    decay: Literal["learned", "none"] = "learned"
    beta_max: float = 2.0
    read: Literal["block", "token"] = "block"
    span: Literal["video", "block"] = "video"

    leak: float = 0.0

    def rule_changes(self) -> dict[str, object]:
        """Return fields and values that differ from ARL2's, whose code would ignore them."""
        defaults = GatedDeltaConfig()
        values = {name: getattr(self, name) for name in (*RULE_FIELDS, "leak")}
        return {name: v for name, v in values.items() if v != getattr(defaults, name)}

    def __post_init__(self):
        tokens = self.block_tokens
        require(tokens >= 0, "model.delta.block_tokens", tokens, "must not be negative")
        object.__setattr__(self, "time_constants", tuple(self.time_constants))
        short, long = self.time_constants
        require(
            0 < short <= long,
            "model.delta.time_constants",
            self.time_constants,
            "must be a rising range above 0, in blocks",
        )
        for name in ("write_load", "read_gain"):
            value = getattr(self, name)
            require(value > 0, f"model.delta.{name}", value, "must be positive")
        require(
            0 < self.beta_max <= 2,
            "model.delta.beta_max",
            self.beta_max,
            "must be in (0, 2]: beyond 2 states grow without bound",
        )
        require(
            0 <= self.leak < 1,
            "model.delta.leak",
            self.leak,
            "must be a share in [0, 1), where 0 is no leak",
        )


@dataclasses.dataclass(frozen=True)
class WindowConfig(MemorySettings):
    """Softmax over the first and the last frames of a video.

    Attributes:
      sink: latent frames at the start of a video that always stay visible.
      frames: last latent frames that a block sees, including its own.
    """

    sink: int = 3
    frames: int = 9

    def __post_init__(self):
        require(
            self.sink >= 0, "sink", self.sink, "must not be negative, where 0 keeps no first frames"
        )
        require(
            self.sink <= self.frames,
            "sink",
            self.sink,
            f"must not be longer than the window, frames={self.frames}",
            "lower sink or raise frames",
        )

    def check(self, model: "ModelConfig") -> None:
        """Raise ConfigError if the window is shorter than a frame block."""
        require(
            self.frames >= model.frames_per_block,
            "frames",
            self.frames,
            f"must be at least model.frames_per_block={model.frames_per_block}: a window "
            "includes the block itself",
            "raise it",
        )


# Settings of each kind. `arl2_jax.memory.register` adds to it.
MEMORY_SETTINGS: dict[str, type[MemorySettings]] = {
    "softmax_cache": MemorySettings,
    "gated_delta": GatedDeltaConfig,
    "window": WindowConfig,
}


@dataclasses.dataclass(frozen=True)
class MemorySpec:
    """The memory of some layers.

    Attributes:
      kind: name of the memory, see `arl2_jax.memory`.
      settings: settings of that kind, or a mapping of their fields; None is the default.
      layers: indices of the layers; () is every layer that nothing else names.
    """

    kind: str
    settings: Any = None
    layers: tuple[int, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        if self.kind not in MEMORY_SETTINGS:
            close = difflib.get_close_matches(str(self.kind), MEMORY_SETTINGS, n=1)
            hint = f"did you mean {close[0]}?" if close else ""
            known = ", ".join(MEMORY_SETTINGS)
            raise ConfigError(
                "is no memory",
                field="kind",
                value=self.kind,
                remedy=hint or f"known are {known}",
            )
        wanted = MEMORY_SETTINGS[self.kind]
        settings = {} if self.settings is None else self.settings
        if isinstance(settings, Mapping):
            settings = _settings(self.kind, wanted, settings)
        require(
            isinstance(settings, wanted),
            "settings",
            settings,
            f"must be {wanted.__name__}, the settings of kind={self.kind}",
        )
        object.__setattr__(self, "settings", settings)


def _settings(kind: str, wanted: type[MemorySettings], values: Mapping[str, Any]) -> MemorySettings:
    known = {field.name: field.default for field in dataclasses.fields(wanted)}
    for name, value in values.items():
        require(
            name in known,
            f"settings.{name}",
            None,
            f"is unknown for kind={kind}",
            f"known are {', '.join(known) or 'none'}",
        )
        whole = isinstance(known[name], int) and not isinstance(known[name], bool)
        require(
            not whole or (isinstance(value, int) and not isinstance(value, bool)),
            f"settings.{name}",
            value,
            "must be a whole number",
        )
    # JSON has lists where settings have tuples.
    plain = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    try:
        return wanted(**plain)
    except ConfigError as error:
        raise error.within("settings.") from None
