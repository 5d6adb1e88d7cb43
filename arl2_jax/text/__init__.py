"""Prompts: cleaned, tokenised, and encoded once."""

from arl2_jax.text.encoder import encode_prompts
from arl2_jax.text.prompts import Tokenizer, clean_prompt

__all__ = ["Tokenizer", "clean_prompt", "encode_prompts"]
