"""Clips of a folder of videos, encoded with the VAE."""

import hashlib
from pathlib import Path

import numpy as np

from arl2_jax.data.videos import Video, decode_frames, index_videos
from arl2_jax.errors import ConfigError
from arl2_jax.generation.release_paths import ReleasePaths
from arl2_jax.generation.released import Resolution
from arl2_jax.preparation.store import Plan, store


def store_videos(
    folder: str | Path,
    out: str | Path | None,
    paths: ReleasePaths,
    *,
    frames: int,
    resolution: Resolution,
    fps: float,
    text_len: int = 512,
    **stored,
) -> int:
    """Cut every video into consecutive clips and store them; the remainder is dropped.

    Args:
      folder: video files, also in subfolders; a.txt next to a.mp4 is its caption.
      out: folder of stored latents; an unfinished one is continued.
      paths: text encoder, tokenizer and VAE.
      frames: latent frames T of a clip.
      resolution: size of the clips; frames are resized to cover it and cropped at the center.
      fps: frames a second at which the videos are sampled.
      text_len: text slots.
      **stored: dtype and records_per_shard of `store`.

    Returns:
      The number of clips in the folder.

    Raises:
      UserError: what is wrong, in one line with the remedy.
    """
    codec = paths.load_codec()
    if frames < 1:
        raise ConfigError("must be positive", field="frames", value=frames)
    rows, columns = (
        _latents(name, getattr(resolution, name), codec.spatial_factor)
        for name in ("height", "width")
    )
    pixel_frames = codec.pixel_frames(frames)
    videos = index_videos(Path(folder), fps, pixel_frames)
    clips = [
        (video, start)
        for video in videos
        for start in range(0, len(video.times) - pixel_frames + 1, pixel_frames)
    ]

    def make(index: int, text: np.ndarray) -> np.ndarray:
        del text
        video, start = clips[index]
        times = video.times[start : start + pixel_frames]
        size = resolution.height, resolution.width
        pixels = decode_frames(video.path, times, size).astype(np.float32) / 127.5 - 1
        return np.asarray(codec.encode(pixels[None])[0], np.float32)

    plan = Plan(
        captions=[video.caption for video, _ in clips],
        make=make,
        latent_shape=(frames, rows, columns, codec.channels),
        codec_weights=paths.vae_fingerprint(),
        source={
            "kind": "videos",
            "files": len(videos),
            "sha256": _digest(videos, Path(folder)),
            "fps": fps,
        },
    )
    return store(plan, out, paths.open_text_encoder(), text_len, **stored)


def _latents(name: str, pixels: int, factor: int) -> int:
    if pixels < 1 or pixels % factor:
        raise ConfigError(
            f"must be a multiple of the {factor} pixels of a latent", field=name, value=pixels
        )
    return pixels // factor


def _digest(videos: list[Video], folder: Path) -> str:
    """Return a digest of the videos' names, sizes and captions."""
    digest = hashlib.sha256()
    for video in videos:
        name, size = video.path.relative_to(folder), video.path.stat().st_size
        digest.update(f"{name}\t{size}\t{video.caption}\n".encode())
    return digest.hexdigest()
