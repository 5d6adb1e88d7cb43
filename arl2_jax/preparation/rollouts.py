"""Clips that the frozen teacher generates from a list of prompts: no video is needed."""

import functools
import hashlib
from pathlib import Path

import jax
import numpy as np

from arl2_jax.config import SamplerConfig, to_config_dict
from arl2_jax.errors import ConfigError, DataError
from arl2_jax.generation.generator import Generator
from arl2_jax.generation.make_video import VideoModel
from arl2_jax.generation.release_paths import ReleasePaths
from arl2_jax.generation.released import Resolution, find_video_model
from arl2_jax.generation.text_conditioning import encode_null_text
from arl2_jax.preparation.store import Plan, store
from arl2_jax.text import TextEncoder
from arl2_jax.weights import find_release, fingerprint


class LazyTeacher:
    """A teacher that is loaded at first use: until then the text encoder has the memory."""

    def __init__(self, model: VideoModel, encoder: TextEncoder, negative_prompt: str):
        self._model, self._encoder, self._negative_prompt = model, encoder, negative_prompt

    @functools.cached_property
    def null_text(self) -> np.ndarray | None:
        """Encode the text that guidance leads away from, [text_len, text_dim]."""
        model = self._model
        return encode_null_text(self._encoder, self._negative_prompt, model.cfg, model.sampler)

    @functools.cached_property
    def generator(self) -> Generator:
        """Load the teacher's parameters and return its generator of latents."""
        cfg, params, sampler = self._model.cfg, self._model.load_params(), self._model.sampler
        return Generator(cfg, params, sampler, latent_shape=self._model.latent_shape)


def store_rollouts(
    prompts: str | Path,
    out: str | Path | None,
    paths: ReleasePaths,
    *,
    weights: str | None,
    sampler: SamplerConfig,
    frames: int,
    resolution: Resolution,
    frames_per_block: int | None = None,
    entry: str | None = None,
    negative_prompt: str = "",
    seed: int = 0,
    **stored,
) -> int:
    """Roll the teacher out on prompts, one clip each, and store the clips.

    A clip depends only on its prompt, its index in the list and the seed, so an interrupted list
    gives the same clips when it is continued.

    Args:
      prompts: text file, one prompt a line; empty lines are skipped.
      out: folder of stored latents; an unfinished one is continued.
      paths: text encoder, tokenizer and VAE; those that are None are looked for in `weights`.
      weights, sampler, resolution, frames_per_block, entry, negative_prompt, seed: as in
        `generation.released.write_from_weights`.
      frames: latent frames T of a clip, whole blocks.
      **stored: dtype and records_per_shard of `store`.

    Returns:
      The number of clips in the folder.

    Raises:
      UserError: what is wrong, in one line with the remedy.
    """
    if not weights:
        raise ConfigError(
            "is missing: the teacher that makes the clips", field="weights", remedy="name it"
        )
    captions = read_prompts(prompts)
    paths = paths.within(weights)
    teacher = find_video_model(weights, paths, sampler, resolution, frames_per_block, entry=entry)
    block = teacher.cfg.frames_per_block
    if frames < 1 or frames % block:
        raise ConfigError(
            f"must be a multiple of the {block} of a block", field="frames", value=frames
        )
    encoder = paths.open_text_encoder()
    lazy_teacher = LazyTeacher(teacher, encoder, negative_prompt)
    plan = Plan(
        captions=captions,
        make=functools.partial(_roll_out, lazy_teacher, frames, seed),
        latent_shape=(frames, *teacher.latent_shape),
        codec_weights=paths.vae_fingerprint(),
        source={
            "kind": "rollouts",
            "prompts": len(captions),
            "sha256": hashlib.sha256("\n".join(captions).encode()).hexdigest(),
            "teacher": fingerprint(find_release(weights).transformer or weights),
            "entry": entry,
            "frames_per_block": block,
            "sampler": to_config_dict(sampler),
            "negative_prompt": negative_prompt if sampler.guidance > 1 else None,
            "compute": teacher.cfg.dtype,
            "seed": seed,
        },
    )
    return store(plan, out, encoder, teacher.cfg.text_len, teacher.cfg.text_dim, **stored)


def read_prompts(path: str | Path) -> list[str]:
    """Read a text file with one prompt a line.

    Raises:
      DataError: the file cannot be read, or has no prompt.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot be read: {error}",
            field="prompts",
            value=path,
            remedy="name a text file, one prompt a line",
        ) from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise DataError("has no prompt", field="prompts", value=path, remedy="write one a line")
    return found


def _roll_out(
    teacher: LazyTeacher, frames: int, seed: int, index: int, text: np.ndarray
) -> np.ndarray:
    null_text = teacher.null_text  # encoded before the teacher's parameters are read
    key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), index)
    return teacher.generator.generate(text, frames=frames, key=key, null_text=null_text)[0]
