"""Cleaning, tokenisation and cached encoding of prompts; word vectors without a text encoder.

Names are imported when they are first used: word vectors need neither tokenizer nor encoder.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arl2_jax.text.encoder import TextEncoder, encode_prompts
    from arl2_jax.text.prompts import Tokenizer, clean_prompt
    from arl2_jax.text.word_vectors import embed_caption

__all__ = ["TextEncoder", "Tokenizer", "clean_prompt", "embed_caption", "encode_prompts"]

_HOMES = {
    "TextEncoder": "encoder",
    "Tokenizer": "prompts",
    "clean_prompt": "prompts",
    "embed_caption": "word_vectors",
    "encode_prompts": "encoder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
