"""Toy text embeddings without a text encoder: a fixed random vector for each word."""

import functools
import hashlib

import numpy as np


def embed_caption(caption: str, text_len: int, text_dim: int) -> np.ndarray:
    """Embed a caption, one word per slot; replaces the text encoder in runs without one.

    Each word has a fixed vector of unit norm, drawn from a stable hash of the word in lower case.
    Words past `text_len` are dropped. Equal words have equal embeddings and different ones almost
    orthogonal embeddings, which carry no other meaning.

    Args:
      caption: words separated by blanks; "" gives zeros, as dropped text does.
      text_len: slots.
      text_dim: width of a slot.

    Returns:
      float32 [text_len, text_dim], zeros past the caption.
    """
    text = np.zeros((text_len, text_dim), np.float32)
    for slot, word in zip(text, caption.lower().split(), strict=False):
        slot[:] = _embed_word(word, text_dim)
    return text


@functools.lru_cache(maxsize=65536)
def _embed_word(word: str, text_dim: int) -> np.ndarray:
    digest = hashlib.sha256(word.encode()).digest()
    vector = np.random.default_rng(int.from_bytes(digest)).standard_normal(text_dim)
    return (vector / np.linalg.norm(vector)).astype(np.float32)
