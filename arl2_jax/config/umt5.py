"""Wan's text encoder."""

import dataclasses
from typing import Any, Literal

from arl2_jax.config.rules import require


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """The encoder of UMT5; the defaults are UMT5-XXL, which encodes Wan's prompts.

    Attributes:
      vocab_size: number of tokens that have an embedding.
      dim: model width.
      ffn_dim: inner width of the gated feed-forward network.
      num_heads, head_dim: attention heads and the width of each.
      num_layers: transformer layers.
      num_buckets, max_distance: buckets of the relative positions, and the distance from which
        all share the last one.
      eps: epsilon of the norms.
      text_len: tokens of a prompt, padding included.
      dtype: type of the matrices and of the activations between norms.
    """

    vocab_size: int = 256_384
    dim: int = 4096
    ffn_dim: int = 10_240
    num_heads: int = 64
    head_dim: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6
    text_len: int = 512
    dtype: Literal["float32", "bfloat16"] = "bfloat16"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "dtype":
                require(value > 0, f"text_encoder.{field.name}", value, "must be positive")
        require(
            self.num_buckets % 4 == 0,
            "text_encoder.num_buckets",
            self.num_buckets,
            "must be a multiple of 4: half of them for each direction, half of those for "
            "single distances",
        )
        require(
            self.max_distance > self.num_buckets // 4,
            "text_encoder.max_distance",
            self.max_distance,
            f"must be more than the {self.num_buckets // 4} single distances that "
            f"text_encoder.num_buckets={self.num_buckets} gives",
        )

    @classmethod
    def tiny(cls, **changes: Any) -> "UMT5Config":
        """Return an encoder for tests, of the width that `ModelConfig.tiny` takes."""
        values: dict[str, Any] = dict(
            vocab_size=384, dim=32, ffn_dim=48, num_heads=4, head_dim=8, num_layers=2, text_len=8,
            num_buckets=8, max_distance=16, dtype="float32",
        )  # fmt: skip
        return cls(**values | changes)
