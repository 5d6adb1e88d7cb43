"""From a model and a text to a video file, one block at a time."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from arl2_jax.codecs import Codec
from arl2_jax.config import ModelConfig, SamplerConfig
from arl2_jax.data.videos import read_frames
from arl2_jax.errors import ConfigError, StorageError
from arl2_jax.generation.generator import Generator
from arl2_jax.generation.text_conditioning import TextConditioning
from arl2_jax.generation.video import VideoWriter
from arl2_jax.models import Params


class VideoModel(NamedTuple):
    """A network and all it needs to make a video.

    Attributes:
      cfg: the network.
      load_params: reads its parameters; called after the text is encoded, as they may be large.
      sampler: how each block is denoised.
      codec: decodes the latents.
      latent_shape: rows, columns and channels of a latent frame.
      fps: frames a second.
    """

    cfg: ModelConfig
    load_params: Callable[[], Params]
    sampler: SamplerConfig
    codec: Codec
    latent_shape: tuple[int, int, int]
    fps: float


def make_video(
    model: VideoModel,
    encode_text: Callable[[], TextConditioning],
    *,
    frames: int,
    out: epath.PathLike,
    past: np.ndarray | None = None,
    leak: float | None = None,
    seed: int = 0,
) -> None:
    """Generate a video and write it as an mp4 file; host memory does not grow with its length.

    Args:
      model: the network with its sampler and codec.
      encode_text: called once, before the model's parameters are read.
      frames: pixel frames to generate, whole blocks.
      out: file to write.
      past: uint8 [F, H, W, 3], whole blocks; it comes first and is continued.
      leak: share of a gated delta state that every block loses in addition to decay and writes; by
        default that of the model.
      seed: seed of the noise.

    Raises:
      UserError: what is wrong, in one line with the remedy, before anything is compiled.
    """
    cfg = model.cfg if leak is None else _with_leak(model.cfg, leak)
    f = cfg.frames_per_block
    known = 0 if past is None else model.codec.latent_frames(len(past))
    latent_frames = _whole_blocks(frames, known, model.codec, f)
    _check_writable(epath.Path(out))
    text = encode_text()
    generator = Generator(
        cfg,
        model.load_params(),
        model.sampler,
        latent_shape=model.latent_shape,
        codec=model.codec,
    )
    stream = generator.stream(
        text.prompt,
        # This kind of key compiles at once on CPUs.
        key=jax.random.key(seed, impl="rbg"),
        past=None if past is None else _encode(past, model.codec),
        frames=latent_frames,
        null_text=text.null,
    )
    with VideoWriter(out, model.fps) as video, tqdm(total=frames, unit="frame") as progress:
        if past is not None:
            video.write(past)
        for block in stream:
            pixels = np.asarray(block)[0]
            video.write(pixels)
            progress.update(len(pixels))


def read_past(
    path: str, model: VideoModel, latent_frames: int, pixels: tuple[int, int]
) -> np.ndarray:
    """Read the beginning of a video file, in whole blocks: uint8 [F, H, W, 3]."""
    return read_frames(Path(path), model.fps, model.codec.pixel_frames(latent_frames), pixels)


def _with_leak(cfg: ModelConfig, leak: float) -> ModelConfig:
    """Return the model with another leak of its states."""
    if not cfg.hybrid_layers or cfg.memory_gate != "learned":
        raise ConfigError(
            "has no effect: no layer of this model reads a gated delta state",
            field="leak",
            value=leak,
            remedy="leave it out",
        )
    return dataclasses.replace(cfg, delta=dataclasses.replace(cfg.delta, leak=leak))


def _whole_blocks(frames: int, known: int, codec: Codec, block: int) -> int:
    """Return the latent frames that decode to `frames` pixel frames after `known` latent ones."""
    before = codec.pixel_frames(known) if known else 0
    pixels = lambda blocks: codec.pixel_frames(known + blocks * block) - before
    blocks = 1
    while pixels(blocks) < frames:
        blocks += 1
    if pixels(blocks) != frames:
        near = sorted({pixels(max(blocks - 1, 1)), pixels(blocks)})
        raise ConfigError(
            f"must be whole blocks: {' or '.join(map(str, near))}",
            field="frames",
            value=frames,
            remedy=f"the first has {pixels(1)} frames, each later one {pixels(2) - pixels(1)}",
        )
    return blocks * block


def _check_writable(out: epath.Path) -> None:
    probe = out.parent / f"{out.name}.unfinished"
    try:
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise StorageError(
            f"cannot be written: {reason}", field="out", value=out, remedy="name another file"
        ) from None


def _encode(pixels: np.ndarray, codec: Codec) -> np.ndarray:
    return np.asarray(codec.encode(pixels[None].astype(np.float32) / 127.5 - 1), np.float32)
