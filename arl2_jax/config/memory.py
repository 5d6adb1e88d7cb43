"""Settings of the gated delta memory."""

import dataclasses
from typing import Literal

from arl2_jax.config.rules import require

# Fields that decide what weights mean; the others set where training starts.
RULE_FIELDS = ("rule", "decay", "beta_max", "read", "span")


@dataclasses.dataclass(frozen=True)
class GatedDeltaConfig:
    """How the gated delta memory starts, and variants of its rule.

    The first group is read where `model.memory_init` is "by_block". Its constants count in blocks
    of n tokens and in heads of D dimensions, so that a state keeps the same share of the past
    whatever n and D are. The second group holds ablations; the defaults are ARL2's. `leak` may be
    set for weights that were trained without it.

    Attributes:
      block_tokens: tokens n of a frame block; 0 takes those of the run's clips.
      time_constants: shortest and longest time in which a state decays to 1 / e, in blocks; heads
        are spread between them, evenly in the logarithm.
      write_load: n beta / D at the start. The writes of a block leave exp(-write_load) of a state,
        in the root mean square and for keys in random directions.
      read_gain: size of the read at the start; P_v begins as read_gain sqrt(D) I, where sqrt(D)
        undoes the read's division by it.
      rule: "delta" replaces what a key has held; "additive" adds to it (gated linear attention).
      decay: "learned", or "none" (g = 0).
      beta_max: largest strength of a write, in (0, 2]; above 1 a write may turn a direction round.
      read: "block" reads the state before the block; "token" reads the state after the tokens
        before, those of the block included.
      span: "video" keeps the state from block to block; "block" begins every block with nothing
        but the block before.
      leak: share of a state, in [0, 1), that every block loses in addition to decay and writes;
        ARL2 has 0. Heads whose decay training has closed fill up in videos far longer than its
        clips, and then remember less; in the study a leak of 0.02 prevents that (docs/study.md).
    """

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
        """What ARL2's code would compute differently: fields that are not its own, and values."""
        defaults = GatedDeltaConfig()
        values = {name: getattr(self, name) for name in (*RULE_FIELDS, "leak")}
        return {name: v for name, v in values.items() if v != getattr(defaults, name)}

    def __post_init__(self):
        tokens = self.block_tokens
        require(tokens >= 0, f"model.delta.block_tokens={tokens} must not be negative")
        object.__setattr__(self, "time_constants", tuple(self.time_constants))
        short, long = self.time_constants
        require(
            0 < short <= long,
            f"model.delta.time_constants={self.time_constants} must be a rising range above 0, in "
            "blocks",
        )
        for name in ("write_load", "read_gain"):
            value = getattr(self, name)
            require(value > 0, f"model.delta.{name}={value} must be positive")
        require(
            0 < self.beta_max <= 2,
            f"model.delta.beta_max={self.beta_max} must be in (0, 2]: beyond 2 states grow without "
            "bound",
        )
        require(
            0 <= self.leak < 1,
            f"model.delta.leak={self.leak} must be a share in [0, 1); 0 is no leak",
        )
