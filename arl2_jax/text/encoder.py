"""Text embeddings of prompts; the encoder is in memory only while it is needed."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from arl2_jax.config import UMT5Config
from arl2_jax.errors import ConfigError, WeightsError
from arl2_jax.models import Params
from arl2_jax.models.umt5 import encode_tokens, umt5_shapes
from arl2_jax.storage import absolute
from arl2_jax.text.cache import EmbeddingCache
from arl2_jax.text.prompts import Tokenizer, check_filled, clean_prompt
from arl2_jax.weights import fingerprint, load_text_encoder, umt5_config

# Prompts shorter than this share one compiled program.
_LEAST_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """A text encoder given by its files, which are read when they are needed.

    Attributes:
      weights: weights of UMT5, a file or a folder.
      tokenizer: tokenizer.json, or its folder.
      cache: folder in which embeddings are cached; None disables the cache.
    """

    weights: str
    tokenizer: str
    cache: str | None = None

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return umt5_config(self.weights).dim

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of weights and tokenizer."""
        return {
            "text_encoder": fingerprint(self.weights),
            "tokenizer": Tokenizer(self.tokenizer).fingerprint,
        }

    def check(self, prompts: Sequence[str], text_len: int, text_dim: int | None = None) -> None:
        """Check that prompts can be encoded, without reading the weights.

        Args:
          prompts: texts of any length.
          text_len: tokens of a prompt, padding included.
          text_dim: width that the embeddings must have, if that matters.

        Raises:
          ConfigError: a prompt is empty or too long.
          WeightsError: a file is missing, or the encoder has another width.
        """
        self._check_width(text_dim)
        Tokenizer(self.tokenizer)(prompts, text_len)

    def encode(
        self,
        prompts: Sequence[str],
        text_len: int,
        text_dim: int | None = None,
        *,
        allow_empty: bool = False,
    ) -> Float[np.ndarray, "b l text_dim"]:
        """Encode prompts; arguments and errors as of `check` and `encode_prompts`."""
        self._check_width(text_dim)
        return encode_prompts(
            prompts,
            text_encoder=self.weights,
            tokenizer=self.tokenizer,
            text_len=text_len,
            cache=self.cache,
            allow_empty=allow_empty,
        )

    def _check_width(self, text_dim: int | None) -> None:
        if text_dim is not None and self.dim != text_dim:
            raise WeightsError(
                f"makes embeddings of width {self.dim}, but the model takes text_dim={text_dim}",
                field="text_encoder",
                value=self.weights,
                remedy="name the text encoder that the model was trained with",
            )


def encode_prompts(
    prompts: Sequence[str],
    *,
    text_encoder: epath.PathLike,
    tokenizer: epath.PathLike,
    text_len: int = 512,
    cache: epath.PathLike | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    allow_empty: bool = False,
) -> Float[np.ndarray, "b l text_dim"]:
    """Encode prompts one by one, so that an embedding does not depend on the other prompts.

    The encoder is loaded if some prompt is not in the cache, and its memory is freed before the
    function returns. Every prompt is checked before the encoder is loaded.

    Args:
      prompts: at least one.
      text_encoder: weights of UMT5, a file or a folder.
      tokenizer: tokenizer.json, or its folder.
      text_len: tokens of a prompt, padding included.
      cache: folder in which embeddings are cached, by cleaned prompt, text_len, dtype, weights and
        tokenizer; None disables the cache.
      dtype: type of the encoder's matrices.
      allow_empty: whether a prompt may be empty, as the text of unguided generation is.

    Returns:
      float32, zeros past each prompt.

    Raises:
      ConfigError: a prompt is empty or too long.
      WeightsError: a file is missing or damaged, or the tokenizer is that of another model.
    """
    if not prompts:
        raise ConfigError("there is no prompt to encode", remedy="give at least one")
    sources = {check_filled(clean_prompt(prompt), allow_empty): prompt for prompt in prompts}
    splitter = Tokenizer(tokenizer)
    facts = {
        "weights": fingerprint(text_encoder),
        "tokenizer": splitter.fingerprint,
        "text_len": text_len,
        "dtype": dtype,
    }
    kept = EmbeddingCache(None if cache is None else absolute(cache), facts)
    found = {text: rows for text in sources if (rows := kept.read(text)) is not None}
    missing = [text for text in sources if text not in found]
    if missing:
        tokens, lengths = splitter(
            [sources[text] for text in missing], text_len, allow_empty=allow_empty
        )
        encoded = _encode(tokens, lengths, text_encoder, splitter, dtype)
        for text, rows in zip(missing, encoded, strict=True):
            found[text] = rows
            kept.write(text, rows)
    return np.stack([_pad(found[clean_prompt(prompt)], text_len) for prompt in prompts])


def _encode(
    tokens: Int[np.ndarray, "b l"],
    lengths: Int[np.ndarray, "b"],
    path: epath.PathLike,
    tokenizer: Tokenizer,
    dtype: Literal["float32", "bfloat16"],
) -> Iterator[Float[np.ndarray, "l text_dim"]]:
    """Load the encoder, and yield each prompt's embedding without padding."""
    cfg = umt5_config(path, text_len=tokens.shape[1], dtype=dtype)
    if tokens.max() >= cfg.vocab_size:
        raise WeightsError(
            f"{tokenizer.file} makes token {tokens.max()}, but {path} has {cfg.vocab_size}",
            remedy="name the tokenizer that belongs to these weights",
        )
    params = _load_on_device(path, cfg)
    try:
        for row, length in zip(tokens, lengths, strict=True):
            # Powers of two: few programs, and no work for most of the padding.
            width = min(len(row), max(_LEAST_TOKENS, 1 << (int(length) - 1).bit_length()))
            x = encode_tokens(params, cfg, row[None, :width], length[None])
            yield np.array(x)[0, :length]
    finally:
        for leaf in jax.tree.leaves(params):
            leaf.delete()


def _load_on_device(path: epath.PathLike, cfg: UMT5Config) -> Params:
    """Read parameters onto this process's first device, tensor by tensor."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    shardings = jax.tree.map(lambda _: here, umt5_shapes(cfg))
    return load_text_encoder(path, cfg, shardings=shardings)


def _pad(rows: np.ndarray, text_len: int) -> np.ndarray:
    return np.pad(rows, ((0, text_len - len(rows)), (0, 0)))
