"""Parts of benchmarks/sprites_study.py."""
