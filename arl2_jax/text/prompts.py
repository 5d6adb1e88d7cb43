"""Preparation of prompts as in Wan: cleaning, then tokenisation."""

import functools
import hashlib
import html
from collections.abc import Sequence

import ftfy
import numpy as np
import tokenizers
from etils import epath
from jaxtyping import Int

from arl2_jax.errors import ConfigError, WeightsError
from arl2_jax.storage import absolute, reason

_FILE = "tokenizer.json"
_END = "</s>"
_PADDING = 0
_DOWNLOAD = "it is part of the Wan2.1 release, in google/umt5-xxl or tokenizer"


def clean_prompt(prompt: str) -> str:
    """Repair mis-decoded characters, resolve HTML entities twice, join words by single blanks.

    Source: Wan2.1.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(text.split())


class Tokenizer:
    """The tokenizer of T5, from the file of the `tokenizers` library."""

    def __init__(self, path: epath.PathLike):
        """Read the file; it is parsed when it is first needed.

        Args:
          path: tokenizer.json, or the folder that contains it.

        Raises:
          WeightsError: the file is missing or cannot be read.
        """
        source = absolute(path)
        self.file = source / _FILE if source.is_dir() else source
        try:
            self._content = self.file.read_bytes()
        except Exception as error:
            raise WeightsError(
                f"the tokenizer {self.file} cannot be read: {reason(error)}",
                remedy=f"name the folder that holds {_FILE} ({_DOWNLOAD})",
            ) from None

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the file, 64 hex digits."""
        return hashlib.sha256(self._content).hexdigest()

    def __call__(
        self, prompts: Sequence[str], text_len: int, *, allow_empty: bool = False
    ) -> tuple[Int[np.ndarray, "b l"], Int[np.ndarray, "b"]]:
        """Clean prompts and split them into tokens.

        Args:
          prompts: texts of any length.
          text_len: most tokens of a prompt, its end mark included.
          allow_empty: whether a prompt may be empty, as the text of unguided generation is.

        Returns:
          Token ids, int32 [B, text_len], each prompt ended by </s> and padded with 0; and the
          number of tokens of each, int32 [B].

        Raises:
          ConfigError: a prompt is empty or has too many tokens.
          WeightsError: the file is not a tokenizer of T5.
        """
        tokens = np.full((len(prompts), text_len), _PADDING, np.int32)
        lengths = np.zeros(len(prompts), np.int32)
        for row, prompt in enumerate(prompts):
            ids = self._split(check_filled(clean_prompt(prompt), allow_empty))
            if len(ids) > text_len:
                raise ConfigError(
                    f"the prompt {shorten(prompt)!r} has {len(ids)} tokens, but there is room for "
                    f"{text_len}",
                    remedy="shorten it",
                )
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
        return tokens, lengths

    def _split(self, text: str) -> list[int]:
        library, end = self._library
        return [*library.encode(text, add_special_tokens=False).ids, end]

    @functools.cached_property
    def _library(self) -> tuple[tokenizers.Tokenizer, int]:
        """The library's tokenizer without truncation and padding, and the id of the end mark."""
        try:
            library = tokenizers.Tokenizer.from_buffer(self._content)
        except Exception as error:
            raise WeightsError(
                f"{self.file} is not a tokenizer: {reason(error)}",
                remedy=f"download it again ({_DOWNLOAD})",
            ) from None
        library.no_truncation()
        library.no_padding()
        end = library.token_to_id(_END)
        if end is None:
            raise WeightsError(
                f"{self.file} has no token {_END}, so it is not a T5 tokenizer",
                remedy=f"name another ({_DOWNLOAD})",
            )
        return library, end


def check_filled(text: str, allow_empty: bool) -> str:
    """Return a cleaned prompt; raise ConfigError if it is empty and that is not allowed."""
    if not text and not allow_empty:
        raise ConfigError("the prompt is empty", remedy="describe what is to be seen")
    return text


def shorten(text: str, limit: int = 60) -> str:
    """Return the beginning of a text, for messages."""
    return text if len(text) <= limit else f"{text[:limit]}..."
