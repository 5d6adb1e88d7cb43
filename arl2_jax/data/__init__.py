"""Clips to train and evaluate on: procedural videos, video files, stored latents."""

from arl2_jax.data.latent_writer import LatentWriter
from arl2_jax.data.latents import LatentSource
from arl2_jax.data.loader import ClipData, open_data, open_short_data
from arl2_jax.data.reveals import Reveal, reveal_clips, reveals
from arl2_jax.data.sprites import SpriteClip, draw_sprite, make_clip
from arl2_jax.data.videos import VideoClips

__all__ = [
    "ClipData",
    "LatentSource",
    "LatentWriter",
    "Reveal",
    "SpriteClip",
    "VideoClips",
    "draw_sprite",
    "make_clip",
    "open_data",
    "open_short_data",
    "reveal_clips",
    "reveals",
]
