"""Memories of all layers of a model: their states, and what they need and can do."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from arl2_jax.config import ModelConfig
from arl2_jax.errors import ConfigError
from arl2_jax.memory import Room, TrainableMemory, make_memory


def init_memory(
    cfg: ModelConfig,
    *,
    batch: int,
    frames: int | None,
    tokens_per_frame: int,
    runs: Sequence[tuple[int, int]] | None = None,
) -> tuple:
    """Empty memories of all layers: a tuple with one stacked state per run of equal layers.

    Args:
      cfg: model.
      batch: videos generated together.
      frames: latent frames of the whole video; None if no end is known, which suits models
        without `unbounded_layers`.
      tokens_per_frame: tokens of a latent frame.
      runs: the stacked layers [start, stop) of the parameters, by default `cfg.layer_runs()`.
    """
    states, room = [], Room(frames, tokens_per_frame, cfg.frames_per_block)
    for start, stop in runs or cfg.layer_runs():
        memory = memory_of(cfg, start)
        one = jax.eval_shape(lambda m=memory: m.init_state(batch, room))
        zeros = lambda s, n=stop - start: jnp.zeros((n, *s.shape), s.dtype)
        states.append(jax.tree.map(zeros, one))
    return tuple(states)


@functools.lru_cache
def memory_of(cfg: ModelConfig, layer: int):
    """A layer's memory without values of its parameters, to ask what it needs and can do."""
    return nnx.eval_shape(
        lambda: make_memory(cfg.memory_of(layer), cfg.attention, rngs=nnx.Rngs(0))
    )


def unbounded_layers(cfg: ModelConfig) -> tuple[int, ...]:
    """Indices of the layers whose memory grows with the video."""
    return tuple(i for i in range(cfg.num_layers) if not memory_of(cfg, i).bounded)


def check_trainable(cfg: ModelConfig) -> None:
    """Raise ConfigError, one line, if a memory of the model has no form for clips."""
    layers = range(cfg.num_layers)
    lacking = [i for i in layers if not isinstance(memory_of(cfg, i), TrainableMemory)]
    if lacking:
        raise ConfigError(
            f"has kind={cfg.memory_of(lacking[0]).kind} in layers {lacking}, which has no form for "
            "clips (attend_clip) and cannot be trained",
            field="model.memories",
            remedy="give these layers another memory, or only generate with it",
        )


def gathers(cfg: ModelConfig) -> bool:
    """Whether a memory of the model gathers something in the passes over a block."""
    return any(memory_of(cfg, i).gathers for i in range(cfg.num_layers))
