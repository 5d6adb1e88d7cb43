"""Memories of self-attention layers, one file each, behind the interface of `interface.py`."""

from typing import Any

from flax import nnx

from arl2_jax.config import MEMORY_SETTINGS, AttentionConfig, MemorySettings, MemorySpec
from arl2_jax.memory.gated_delta import GatedDelta
from arl2_jax.memory.interface import Memory, Projections, Room, TrainableMemory
from arl2_jax.memory.softmax_cache import CacheState, SoftmaxCache
from arl2_jax.memory.window import Window, WindowState

MEMORIES: dict[str, Any] = {
    "softmax_cache": SoftmaxCache,
    "gated_delta": GatedDelta,
    "window": Window,
}


def register(kind: str, memory: type, settings: type[MemorySettings] = MemorySettings) -> None:
    """Register a memory under a new name, for `ModelConfig.memories`.

    Args:
      kind: its name.
      memory: an nnx.Module with the methods of `Memory`, and for training of `TrainableMemory`.
      settings: frozen dataclass of its settings; all have defaults.

    Raises:
      ValueError: the name is taken.
    """
    if kind in MEMORIES:
        raise ValueError(f"kind={kind!r} is taken by {MEMORIES[kind].__name__}; choose another")
    MEMORIES[kind], MEMORY_SETTINGS[kind] = memory, settings


def make_memory(spec: MemorySpec, cfg: AttentionConfig, *, rngs: nnx.Rngs) -> Any:
    """Make the memory of a layer."""
    return MEMORIES[spec.kind](spec.settings, cfg, rngs=rngs)


__all__ = [
    "MEMORIES",
    "CacheState",
    "GatedDelta",
    "Memory",
    "Projections",
    "Room",
    "SoftmaxCache",
    "TrainableMemory",
    "Window",
    "WindowState",
    "make_memory",
    "register",
]
