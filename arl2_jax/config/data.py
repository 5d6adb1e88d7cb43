"""Sources of clips."""

import dataclasses
from typing import Literal

from arl2_jax.config.rules import require


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
      pause: frames that a sprite rests each time it passes behind an occluder (drawn uniformly
        from this inclusive range).
      lamp: number of frames before a hidden sprite is seen again in which a lamp on the occluder
        shows where; 0 is no lamp. With a lamp, when and where a sprite comes out is visible, and
        only its appearance must be remembered.
      only_reveals: omit clips in which no hidden sprite comes out again, so that every clip needs
        the memory.
    """

    count: tuple[int, int] = (2, 2)
    colors: int = 4
    shapes: int = 3
    size: int = 5
    speed: tuple[float, float] = (3.0, 3.0)
    vertical: bool = False
    occluders: int = 1
    occluder_width: int = 14
    pause: tuple[int, int] = (0, 0)
    lamp: int = 0
    only_reveals: bool = False

    def __post_init__(self):
        require(
            1 <= self.count[0] <= self.count[1],
            "data.sprites.count",
            self.count,
            "must be a rising range from at least 1",
        )
        require(
            0 < self.speed[0] <= self.speed[1],
            "data.sprites.speed",
            self.speed,
            "must be a rising range above 0",
        )
        _check_pause("data.sprites.pause", self.pause)
        require(self.lamp >= 0, "data.sprites.lamp", self.lamp, "must not be negative")
        require(2 <= self.colors <= 8, "data.sprites.colors", self.colors, "must be in 2..8")
        require(1 <= self.shapes <= 5, "data.sprites.shapes", self.shapes, "must be in 1..5")
        require(self.size >= 3, "data.sprites.size", self.size, "must be at least 3 pixels")


@dataclasses.dataclass(frozen=True)
class ShortClipsConfig:
    """Short clips, which a phase may begin with (its `short_steps`).

    Attention over the past costs less per frame in them, and with short rests they have more
    reveals per frame.

    Attributes:
      frames: latent frames; a multiple of model.frames_per_block that divides data.frames. With
        stored latents, the first ones are used.
      pause: data.sprites.pause of short clips.
    """

    frames: int = 0
    pause: tuple[int, int] = (0, 0)

    def __post_init__(self):
        require(self.frames >= 0, "data.short.frames", self.frames, "must not be negative")
        _check_pause("data.short.pause", self.pause)


def _check_pause(name: str, pause: tuple[int, int]) -> None:
    require(0 <= pause[0] <= pause[1], name, pause, "must be a rising range from at least 0")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Source of clips.

    Attributes:
      source: "synthetic" makes sprite videos on the fly; "video" decodes a folder of video files;
        "latents" reads stored latents and text embeddings.
      path: folder of the video files or of the stored latents.
      frames: latent frames in a clip; a multiple of model.frames_per_block.
      height, width: pixels of the decoded video.
      fps: frames a second of the decoded video.
      codec: pixels <-> latents; "space_to_depth" is lossless and keeps the frame rate, "wan_vae" is
        Wan's autoencoder, whose latents are stored before training.
      codec_factor: rows and columns of pixels per latent; 8 for Wan's autoencoder.
      vae: file or folder with the weights of "wan_vae", which decodes the report's pictures and
        videos; without it the report has none.
      held_out: clips reserved for evaluation.
      sprites: the procedural videos.
      short: short clips, for the start of a phase.
      workers: grain worker processes; 0 reads in the training process.
    """

    source: Literal["synthetic", "video", "latents"] = "synthetic"
    path: str = ""
    frames: int = 10
    height: int = 12
    width: int = 32
    fps: float = 8.0
    codec: Literal["space_to_depth", "wan_vae"] = "space_to_depth"
    codec_factor: int = 2
    vae: str = ""
    held_out: int = 64
    sprites: SpriteConfig = SpriteConfig()
    short: ShortClipsConfig = ShortClipsConfig()
    workers: int = 0

    def __post_init__(self):
        for name in ("frames", "height", "width", "fps", "codec_factor", "held_out"):
            value = getattr(self, name)
            require(value > 0, f"data.{name}", value, "must be positive")
        require(self.workers >= 0, "data.workers", self.workers, "must not be negative")
        for name in ("height", "width"):
            value = getattr(self, name)
            require(
                value % self.codec_factor == 0,
                f"data.{name}",
                value,
                f"must be a multiple of data.codec_factor={self.codec_factor}",
            )
        require(
            self.codec != "wan_vae" or self.source == "latents",
            "data.codec",
            "wan_vae",
            f"needs data.source=latents, not {self.source}",
            "store the clips first (arl2_jax.preparation), or set data.codec=space_to_depth",
        )
        require(
            self.codec == "wan_vae" or not self.vae,
            "data.vae",
            self.vae,
            f"has no use with data.codec={self.codec}",
            "remove it or set data.codec=wan_vae",
        )
        require(
            self.source == "synthetic" or bool(self.path),
            "data.path",
            None,
            f"is empty: data.source={self.source} needs the folder to read",
            "set it",
        )
