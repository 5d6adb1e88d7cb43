"""Modules of benchmarks/sprites_study.py."""
