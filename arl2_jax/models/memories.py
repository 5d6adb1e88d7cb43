"""Memories of all layers of a model: their states and properties."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from arl2_jax.config import MemorySpec, ModelConfig
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
    """Return empty memories of all layers: a tuple with one stacked state per run of equal layers.

    Args:
      cfg: model.
      batch: videos generated together.
      frames: latent frames of the whole video; None if no end is known, which suits models
        without `unbounded_layers`.
      tokens_per_frame: tokens of a latent frame.
      runs: the stacked layers [start, stop) of the parameters, by default `cfg.layer_runs()`.
    """
    shapes = _state_shapes(cfg, runs or cfg.layer_runs(), batch, frames, tokens_per_frame)
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _state_shapes(cfg: ModelConfig, runs, batch: int, frames: int | None, tokens_per_frame: int):
    """Return shapes of the states of all runs, each sized for its own phase."""
    states = []
    for start, stop in runs:
        memory, phase = memory_of(cfg, start), cfg.memory_of(start).settings.next_phase()
        ends = [end for end in (frames, phase and phase[0]) if end is not None]
        room = Room(min(ends, default=None), tokens_per_frame, cfg.frames_per_block)
        one = jax.eval_shape(lambda memory=memory, room=room: memory.init_state(batch, room))
        stacked = lambda s, n=stop - start: jax.ShapeDtypeStruct((n, *s.shape), s.dtype)
        states.append(jax.tree.map(stacked, one))
    return tuple(states)


def hand_over(
    before: ModelConfig,
    after: ModelConfig,
    memory: tuple,
    *,
    frames: int | None,
    tokens_per_frame: int,
    runs: Sequence[tuple[int, int]] | None = None,
) -> tuple:
    """Convert the memories of all layers from the end of one phase to the beginning of the next.

    Args:
      before, after: models of both phases, neighbours in `ModelConfig.phases`.
      memory: memories of all layers, from `apply`.
      frames, tokens_per_frame, runs: as in `init_memory`.

    Raises:
      ValueError: a memory hands over states that are not those of its second phase.
    """
    runs, states = runs or before.layer_runs(), list(memory)
    batch = jax.tree.leaves(memory)[0].shape[1]
    wanted = _state_shapes(after, runs, batch, frames, tokens_per_frame)
    changed: dict[MemorySpec, list[int]] = {}
    for i, (start, _) in enumerate(runs):
        if before.memory_of(start) != after.memory_of(start):
            changed.setdefault(before.memory_of(start), []).append(i)
    room = Room(frames, tokens_per_frame, after.frames_per_block)
    for spec, indices in changed.items():
        found = memory_of(before, runs[indices[0]][0]).hand_over([states[i] for i in indices], room)
        for i, state in zip(indices, found, strict=True):
            _check_state(spec.kind, state, wanted[i])
            states[i] = state
    return tuple(states)


def _check_state(kind: str, state, wanted) -> None:
    import chex

    try:
        chex.assert_trees_all_equal_shapes_and_dtypes(state, wanted)
    except AssertionError as error:
        raise ValueError(
            f"kind={kind!r} hands over other states (tree 0) than its second phase has (tree 1): "
            f"{error}"
        ) from None


@functools.lru_cache
def memory_of(cfg: ModelConfig, layer: int):
    """Return a layer's memory with abstract parameters, to query its properties."""
    return nnx.eval_shape(
        lambda: make_memory(cfg.memory_of(layer), cfg.attention, rngs=nnx.Rngs(0))
    )


def unbounded_layers(cfg: ModelConfig) -> tuple[int, ...]:
    """Return the indices of layers whose memory, in their last phase, grows with the video."""
    _, last = cfg.phases()[-1]
    return tuple(i for i in range(cfg.num_layers) if not memory_of(last, i).bounded)


def check_trainable(cfg: ModelConfig) -> None:
    """Raise ConfigError, one line, if a memory of the model cannot be trained."""
    layers = range(cfg.num_layers)
    phased = [i for i in layers if cfg.memory_of(i).settings.next_phase()]
    if phased:
        raise ConfigError(
            f"has kind={cfg.memory_of(phased[0]).kind} in layers {phased}, which has a second "
            "phase and cannot be trained",
            field="model.memories",
            remedy="give these layers another memory, or only generate with it",
        )
    lacking = [i for i in layers if not isinstance(memory_of(cfg, i), TrainableMemory)]
    if lacking:
        raise ConfigError(
            f"has kind={cfg.memory_of(lacking[0]).kind} in layers {lacking}, which has no form for "
            "clips (attend_clip) and cannot be trained",
            field="model.memories",
            remedy="give these layers another memory, or only generate with it",
        )


def gathers(cfg: ModelConfig) -> bool:
    """Tell whether a memory of the model gathers aux in the passes over a block."""
    return any(memory_of(cfg, i).gathers for i in range(cfg.num_layers))
