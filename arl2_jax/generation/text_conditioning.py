"""Text that generation is conditioned on: the prompt and the negative prompt of guidance."""

from typing import NamedTuple

import numpy as np

from arl2_jax.config import ModelConfig, SamplerConfig
from arl2_jax.text import TextEncoder


class TextConditioning(NamedTuple):
    """Embeddings [text_len, text_dim] of the prompt, and of the text guidance leads away from."""

    prompt: np.ndarray
    null: np.ndarray | None = None


def encode_text(
    encoder: TextEncoder,
    prompt: str,
    negative_prompt: str,
    cfg: ModelConfig,
    sampler: SamplerConfig,
) -> TextConditioning:
    """Encode a prompt and, if the sampler guides, the negative prompt.

    Raises:
      ConfigError: the prompt is empty or too long.
      WeightsError: a file is missing, or belongs to another model.
    """
    [text] = encoder.encode([prompt], cfg.text_len, cfg.text_dim)
    return TextConditioning(text, encode_null_text(encoder, negative_prompt, cfg, sampler))


def encode_null_text(
    encoder: TextEncoder, negative_prompt: str, cfg: ModelConfig, sampler: SamplerConfig
) -> np.ndarray | None:
    """Encode the text that guidance leads away from, [text_len, text_dim]; None without guidance.

    Raises:
      ConfigError, WeightsError: as `encode_text`, but the negative prompt may be empty.
    """
    if sampler.guidance == 1:
        return None
    return encoder.encode([negative_prompt], cfg.text_len, cfg.text_dim, allow_empty=True)[0]
