"""Prompts: cleaned, tokenised, and encoded once."""
