"""Makes clips one by one and stores them; a killed run can be continued."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from arl2_jax.data import LatentWriter
from arl2_jax.data.manifest import MANIFEST
from arl2_jax.errors import ConfigError, DataError, StorageError
from arl2_jax.storage import check_writable
from arl2_jax.text import TextEncoder


class Plan(NamedTuple):
    """Clips to make.

    Attributes:
      captions: text of each clip.
      make: (index, text embedding [text_len, text_dim]) -> latents [T, h, w, C] of the clip.
      latent_shape: (T, h, w, C).
      codec_weights: fingerprint of the VAE's weights.
      source: all that determines what `make` returns, as JSON. A folder is continued only with
        the same source and the same text encoder.
    """

    captions: list[str]
    make: Callable[[int, np.ndarray], np.ndarray]
    latent_shape: tuple[int, int, int, int]
    codec_weights: str
    source: Mapping[str, Any]


def store(
    plan: Plan,
    out: str | Path | None,
    encoder: TextEncoder,
    text_len: int,
    text_dim: int | None = None,
    *,
    dtype: str = "bfloat16",
    records_per_shard: int = 64,
) -> int:
    """Make the clips of a plan that `out` does not have yet.

    Args:
      plan: the clips.
      out: folder of stored latents; an unfinished one is continued.
      encoder: text encoder. Captions are encoded shard by shard, so that those of a long plan are
        never in memory together.
      text_len: text slots.
      text_dim: width that the text encoder must have; None allows any.
      dtype: dtype of the stored numbers.
      records_per_shard: clips in a file, and the most clips that a kill can lose.

    Returns:
      The number of clips in the folder.

    Raises:
      ConfigError: the folder was started with another plan.
      StorageError: the folder is complete, or cannot be written.
      DataError: a clip holds values that are not finite.
    """
    if not out:
        raise ConfigError("is missing: the folder to write", field="out", remedy="name it")
    if records_per_shard < 1:
        raise ConfigError("must be positive", field="records_per_shard", value=records_per_shard)
    if (Path(out) / MANIFEST).exists():
        raise StorageError(
            "holds stored latents already", field="out", value=out, remedy="name another folder"
        )
    encoder.check(plan.captions, text_len, text_dim)
    check_writable(out, field="out")
    writer = LatentWriter(
        out,
        plan.latent_shape,
        (text_len, encoder.dim),
        dtype,
        records_per_shard,
        codec_weights=plan.codec_weights,
        source={**plan.source, **encoder.fingerprints},
        resume=True,
    )
    total = len(plan.captions)
    if writer.count:
        logging.info("%s has %d of %d clips; continuing after them", out, writer.count, total)
    with writer, tqdm(total=total, initial=writer.count, unit="clip") as progress:
        for first in range(writer.count, total, records_per_shard):
            captions = plan.captions[first : first + records_per_shard]
            for i, text in enumerate(encoder.encode(captions, text_len), start=first):
                _write(writer, plan.make(i, text), text, i, plan.captions[i])
                progress.update()
    return total


def _write(writer: LatentWriter, latents: np.ndarray, text: np.ndarray, i: int, caption: str):
    try:
        writer.write(latents, text)
    except ValueError as error:
        raise DataError(
            f"clip {i} ({caption[:60]!r}): {error}",
            remedy="the weights or the sampler are at fault, or dtype is too narrow",
        ) from None
