"""Named sizes of the recurrence, shared by tests and benchmarks."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call: B, T, H, K, V and the tokens of one frame block."""

    batch: int
    time: int
    heads: int
    key_dim: int
    value_dim: int
    block_size: int

    @property
    def blocks(self) -> int:
        """Number of blocks of a call."""
        return self.time // self.block_size


# 480 x 832 video: 30 x 52 tokens a latent frame; three latent frames a block, or one (framewise).
SHAPES: dict[str, Shape] = {
    "wan1p3b_block": Shape(1, 4680, 12, 128, 128, 4680),
    "wan1p3b_clip": Shape(1, 7 * 4680, 12, 128, 128, 4680),
    "wan1p3b_framewise_block": Shape(1, 1560, 12, 128, 128, 1560),
    "wan1p3b_framewise_clip": Shape(1, 21 * 1560, 12, 128, 128, 1560),
    "wan14b_block": Shape(1, 4680, 40, 128, 128, 4680),
    "wan14b_clip": Shape(1, 7 * 4680, 40, 128, 128, 4680),
    "tiny": Shape(16, 216, 4, 32, 32, 36),
}
