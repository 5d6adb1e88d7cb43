"""Sizes of the data tests, spelled out: no default of the program decides what is tested."""

import functools

from arl2_jax.config import DataConfig, ModelConfig, SpriteConfig

tiny_model = functools.partial(ModelConfig.tiny, in_dim=48, out_dim=48)
make_sprites = functools.partial(
    SpriteConfig, count=(1, 2), size=7, speed=(3.0, 4.0), occluder_width=18
)


def make_data(**changes) -> DataConfig:
    """24 x 48 pixels in squares of 4 x 4, 12 frames."""
    fixed = dict(frames=12, height=24, width=48, codec_factor=4, sprites=make_sprites())
    return DataConfig(**(fixed | changes))
