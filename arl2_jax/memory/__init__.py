"""Memories of self-attention layers, one file each, behind the interface of `interface.py`."""

from arl2_jax.memory.gated_delta import GatedDelta
from arl2_jax.memory.interface import Memory, Projections
from arl2_jax.memory.softmax_cache import CacheState, SoftmaxCache

MEMORIES = {"softmax_cache": SoftmaxCache, "gated_delta": GatedDelta}

__all__ = ["MEMORIES", "CacheState", "GatedDelta", "Memory", "Projections", "SoftmaxCache"]
