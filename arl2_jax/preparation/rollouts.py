"""Clips that the frozen teacher makes from a list of prompts: no video is needed."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from arl2_jax.config import SamplerConfig, to_config_dict
from arl2_jax.errors import ConfigError, DataError
from arl2_jax.generation.generator import Generator
from arl2_jax.generation.make_video import VideoModel
from arl2_jax.generation.release_paths import ReleasePaths
from arl2_jax.generation.released import Picture, find_video_model
from arl2_jax.generation.text_conditioning import encode_null_text
from arl2_jax.preparation.store import Plan, store
from arl2_jax.text import TextEncoder
from arl2_jax.weights import find_release, fingerprint


class Rolling(NamedTuple):
    """The teacher at work, and what guidance leads it away from, [text_len, text_dim]."""

    generator: Generator
    null_text: np.ndarray | None


def store_rollouts(
    prompts: str | Path,
    out: str | Path | None,
    paths: ReleasePaths,
    *,
    weights: str | None,
    sampler: SamplerConfig,
    frames: int,
    picture: Picture,
    frames_per_block: int | None = None,
    entry: str | None = None,
    negative_prompt: str = "",
    seed: int = 0,
    **stored,
) -> int:
    """Rolls the teacher out on prompts, one clip each, and stores the clips.

    A clip depends on its prompt, its place in the list and the seed alone, so that a list that was
    interrupted gives the clips that it would have given.

    Args:
      prompts: text file, one prompt a line; empty lines are passed over.
      out: folder of stored latents; one that is unfinished is continued.
      paths: text encoder, tokenizer and VAE; what is None is looked for in `weights`.
      weights, sampler, picture, frames_per_block, entry, negative_prompt, seed: as in
        `generation.released.write_from_weights`.
      frames: latent frames T of a clip, whole blocks.
      **stored: dtype and records_per_shard of `store`.

    Returns:
      Clips in the folder.

    Raises:
      UserError: what is wrong, in one line with the remedy.
    """
    if not weights:
        raise ConfigError(
            "is missing: the teacher that makes the clips", field="weights", remedy="name it"
        )
    captions = read_prompts(prompts)
    paths = paths.within(weights)
    teacher = find_video_model(weights, paths, sampler, picture, frames_per_block, entry=entry)
    block = teacher.cfg.frames_per_block
    if frames < 1 or frames % block:
        raise ConfigError(
            f"must be a multiple of the {block} of a block", field="frames", value=frames
        )
    encoder = paths.open_text_encoder()
    plan = Plan(
        captions=captions,
        make=functools.partial(_roll_out, _once(teacher, encoder, negative_prompt), frames, seed),
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
    """Reads a text file with one prompt a line.

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


def _once(teacher: VideoModel, encoder: TextEncoder, negative_prompt: str) -> Callable[[], Rolling]:
    """Makes the generator at its first use: until then the text encoder has the room."""

    def make() -> Rolling:
        null_text = encode_null_text(encoder, negative_prompt, teacher.cfg, teacher.sampler)
        params, shape = teacher.load_params(), teacher.latent_shape
        return Rolling(
            Generator(teacher.cfg, params, teacher.sampler, latent_shape=shape), null_text
        )

    return functools.cache(make)


def _roll_out(
    rolling: Callable[[], Rolling], frames: int, seed: int, index: int, text: np.ndarray
) -> np.ndarray:
    generator, null_text = rolling()
    key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), index)
    return generator.generate(text, frames=frames, key=key, null_text=null_text)[0]
