"""Held-out clips, continued past the length of the training clips."""

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from arl2_jax.codecs import Codec
from arl2_jax.config import Config
from arl2_jax.data import ClipData
from arl2_jax.data.sprite_clips import SpriteClips
from arl2_jax.evaluation.gap import Model, put_like_params
from arl2_jax.evaluation.labels import LABELS
from arl2_jax.evaluation.plots import Row, contact_sheet
from arl2_jax.evaluation.side_by_side import side_by_side, timeline
from arl2_jax.generation.rollout import rollout
from arl2_jax.generation.video import write_video


class Continuations(NamedTuple):
    """Held-out clips, continued by several models.

    Attributes:
      videos: name of the model, or "truth" -> uint8 [clips, F, H, W, 3].
      given: pixel frames at the start that were given.
      trained: pixel frames of a training clip.
    """

    videos: dict[str, np.ndarray]
    given: int
    trained: int


def continue_clips(
    config: Config, data: ClipData, found: Mapping[str, Model], key
) -> Continuations | None:
    """Continue the beginning of held-out clips past the length of the training clips.

    Args:
      config: the run.
      data: its clips.
      found: its models by name; teacher, untrained hybrid and student are shown.
      key: random key.

    Returns:
      The continuations; None if the run asks for none or cannot decode them.
    """
    count = min(config.evaluation.rollout_clips, config.data.held_out)
    f, blocks = config.model.frames_per_block, config.blocks * config.evaluation.rollout_length
    if min(count, blocks) <= 0:
        return None
    codec = data.codec
    if codec is None:
        logging.info("report: no videos; data.vae names no weights that would decode them")
        return None
    frames = blocks * f
    logging.info("report: continuing %d held-out clips to %d latent frames", count, frames)
    # Just enough to see how things move.
    given = min(math.ceil(config.blocks / 4), blocks - 1)
    batch = data.held_out(count)
    past = batch["latents"][:, : given * f]
    videos = {"truth": truth(config, codec, batch["latents"], frames)}
    for name in ("teacher", "untrained", "student"):
        if name not in found:
            continue
        params, cfg = found[name]
        placed = put_like_params(params, {"past": past, "text": batch["text"]})
        made = rollout(
            params,
            cfg,
            config.sampler,
            placed["text"],
            key,
            blocks=blocks - given,
            shape=config.latent_shape,
            past=placed["past"] if given else None,
        )
        own = np.asarray(multihost_utils.process_allgather(made, tiled=True))
        videos[name] = to_uint8(codec.decode(np.concatenate([past, own], axis=1)))
    seen = codec.pixel_frames(given * f)
    return Continuations(videos, seen, codec.pixel_frames(config.data.frames))


def truth(config: Config, codec: Codec, latents: np.ndarray, frames: int) -> np.ndarray:
    """Return held-out clips, with their continuation if it is known: uint8 [B, F, H, W, 3]."""
    if config.data.source != "synthetic":
        return to_uint8(codec.decode(latents))
    data = dataclasses.replace(config.data, frames=codec.pixel_frames(config.data.frames))
    block = codec.pixel_frames(config.model.frames_per_block)
    source = SpriteClips(data, block, codec.pixel_frames(frames))
    return np.stack([source.held_out(i)[0] for i in range(len(latents))])


def continuation_sheet(continued: Continuations) -> bytes:
    """Draw frames of the continuations, from the last given one to the end: a PNG file."""
    videos, given, trained = continued
    count = max(video.shape[1] for video in videos.values())
    later = np.linspace(trained, count, min(4, count // trained)).astype(int) - 1
    times = sorted({max(given - 1, 0), (given + trained) // 2, *later.tolist()})
    parts = {t: part.label for part in timeline(count, given, trained) for t in range(*part[2:])}
    rows = []
    for i in range(len(next(iter(videos.values())))):
        for name, video in videos.items():
            frames = [video[i, t] if t < video.shape[1] else None for t in times]
            rows.append(Row(LABELS[name], frames, opens=name == "truth"))
    titles = [f"frame {t + 1}: {parts[t]}" for t in times]
    return contact_sheet(rows, titles, title="Held-out clips, continued")


def write_continuations(continued: Continuations, folder: epath.Path, fps: float) -> None:
    """Write one mp4 file for each clip, with all models side by side."""
    for i in range(len(continued.videos["truth"])):
        videos = {LABELS[name]: video[i] for name, video in continued.videos.items()}
        frames = side_by_side(videos, given=continued.given, trained=continued.trained)
        write_video(folder / f"continued_{i:02d}.mp4", frames, fps)


def to_uint8(pixels) -> np.ndarray:
    """Convert pixels in [-1, 1] to uint8."""
    return np.clip(np.rint((np.asarray(pixels) + 1) * 127.5), 0, 255).astype(np.uint8)
