"""Named sizes of softmax attention, shared by tests and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call: B, Tq, Tk, H, D; `filled` of the Tk keys are visible, or all."""

    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    filled: int | None = None

    @property
    def visible(self) -> int:
        """Number of visible keys."""
        return self.keys if self.filled is None else self.filled


# 480 x 832 video, 1560 tokens a latent frame, three latent frames a block. The cache holds 21
# latent frames in a buffer for 231.
SHAPES: dict[str, Shape] = {
    "wan1p3b_block": Shape(1, 4680, 4680, 12, 128),
    "wan1p3b_clip": Shape(7, 4680, 4680, 12, 128),  # blocks folded into the batch
    "wan1p3b_cache": Shape(1, 4680, 77 * 4680, 12, 128, 7 * 4680),
    "wan1p3b_cache_full": Shape(1, 4680, 7 * 4680, 12, 128),
    "wan1p3b_text": Shape(1, 4680, 512, 12, 128),
    "wan14b_block": Shape(1, 4680, 4680, 40, 128),
    "tiny": Shape(2, 36, 72, 4, 32, 50),
}
