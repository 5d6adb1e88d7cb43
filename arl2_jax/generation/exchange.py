"""One block drawn from memories that are exchanged between twin clips.

This shows which memory carries what a block knows of the past. Two clips are twins if they differ
only in what is tested. If a block reads one memory of its twin and otherwise its own, the drawing
shows what that memory contains.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from arl2_jax import models
from arl2_jax.config import ModelConfig, SamplerConfig
from arl2_jax.diffusion import draw_noise
from arl2_jax.generation import rollout

# What is read for the kind of memory that an exchange replaces; the other kind is the clip's own.
_OWN, _TWIN, _ZERO = range(3)
# For each exchange: whether it replaces memories of converted or of other layers, and by what.
_READ = {
    "none": (True, _OWN),
    "states": (True, _TWIN),
    "caches": (False, _TWIN),
    "zeroed": (True, _ZERO),
}
EXCHANGES = tuple(_READ)


class OfLayers(NamedTuple):
    """An exchange in some layers only; the others read their own memories.

    Attributes:
      name: one of `EXCHANGES`.
      layers: indices of layers that have that kind of memory.
    """

    name: str
    layers: tuple[int, ...]


# In all layers that have the memory, or in some of them.
Exchange = str | OfLayers


def exchanges_of(cfg: ModelConfig) -> tuple[str, ...]:
    """Return the exchanges that a model has the memories for, "none" first."""
    states = bool(cfg.converted_layers) and cfg.memory_gate == "learned"
    caches = len(cfg.converted_layers) < cfg.num_layers
    has = {"none": True, "states": states, "caches": caches, "zeroed": states}
    return tuple(name for name in EXCHANGES if has[name])


@functools.partial(jax.jit, static_argnames=("cfg", "sampler", "exchanges"))
def draw_exchanged(
    params,
    cfg: ModelConfig,
    sampler: SamplerConfig,
    text: Float[Array, "b l text_dim"],
    keys: Array,
    clips: Float[Array, "b t rows columns channels"],
    block: Int[Array, ""],
    *,
    exchanges: tuple[Exchange, ...] = ("none",),
) -> Float[Array, "exchanges drawings b f rows columns channels"]:
    """Draw one block of each clip from noise after its clean past, under several exchanges.

    Neighbours in the batch are twins. The past is written block by block; then the block is drawn,
    but not written. An exchange replaces one kind of memory in every read, of the past and of the
    drawing:

      "none": nothing is replaced, all memories are the clip's own;
      "states": the twin's states, in converted layers;
      "caches": the twin's caches, in all other layers;
      "zeroed": zeros as states.

    The twin's memories are those without an exchange. What a clip writes follows from what it has
    read, so an identity that it no longer reads cannot reach it through another layer's memory.
    With sampler.context_noise, twins and exchanges share the noise with which the past is written.

    Args:
      params, cfg, sampler: as in `arl2_jax.generation.rollout.rollout`.
      text: text embeddings.
      keys: random keys [K]; each draws the block once, from the same noise under all exchanges.
        The first is also the source of the noise in the past.
      clips: clean latents, whole blocks; an even number of clips.
      block: index of the frame block to draw, may be traced.
      exchanges: names of `EXCHANGES`, or `OfLayers` for some layers only.

    Returns:
      The drawn blocks for every exchange and key, float32.

    Raises:
      ValueError: an odd number of clips, an unknown exchange, or layers without that memory.
    """
    if len(clips) % 2:
        raise ValueError(f"{len(clips)} clips are given; twins come in pairs")
    f, tokens = cfg.frames_per_block, clips.shape[2] * clips.shape[3]
    context, empty = rollout.init_rollout(
        params, cfg, sampler, text, keys[0],
        frames=clips.shape[1],
        tokens_per_frame=tokens // (cfg.patch_size[1] * cfg.patch_size[2]),
    )  # fmt: skip
    made = ("none", *(name for name in exchanges if name != "none"))
    codes = jnp.array([_codes(cfg, exchange) for exchange in made])
    runs = models.runs_of(context.params)
    blocks = rearrange(clips, "b (m f) ... -> m b f ...", f=f)
    # Memories of every exchange; first those with nothing exchanged, which twins read.
    memories = jax.tree.map(lambda x: jnp.broadcast_to(x, (len(codes), *x.shape)), empty.memory)
    past_key = jax.random.split(keys[0])[0]  # drawing uses the other half

    def write(i, memories):
        first = jax.tree.map(lambda x: x[0], memories)
        noisy = sampler.context_noise > 0
        eps = twin_noise(jax.random.fold_in(past_key, i), blocks.shape[1:]) if noisy else None

        def one(exchange):
            memory, code = exchange
            state = empty._replace(memory=memory, position=i * f)
            read = _read(runs, memory, first, code)
            written = rollout.write_block(
                context, cfg, sampler, state, blocks[i], read=read, eps=eps
            )
            return written.memory

        return jax.lax.map(one, (memories, codes))

    memories = jax.lax.fori_loop(0, block, write, memories)
    first = jax.tree.map(lambda x: x[0], memories)

    def draw(exchange):
        memory, code = exchange
        read = _read(runs, memory, first, code)

        def once(key):
            state = rollout.RolloutState(read, block * f, key)
            return rollout.denoise_block(context, cfg, sampler, state, blocks.shape[1:])[1]

        return jax.lax.map(once, keys)

    asked = jnp.array([made.index(name) for name in exchanges])
    return jax.lax.map(draw, jax.tree.map(lambda x: x[asked], (memories, codes)))


def _codes(cfg: ModelConfig, exchange: Exchange) -> Int[np.ndarray, "layers"]:
    """Return the code of what each layer reads under an exchange."""
    name, layers = exchange if isinstance(exchange, OfLayers) else (exchange, None)
    if name not in _READ:
        raise ValueError(f"exchanges has {[name]}; known are {', '.join(EXCHANGES)}")
    converted, code = _READ[name]
    having = [i for i in range(cfg.num_layers) if (i in cfg.converted_layers) == converted]
    if lacking := sorted({*(layers or ())} - {*having}):
        raise ValueError(f"the exchange {name!r} is of layers {lacking}, which lack that memory")
    codes = np.full(cfg.num_layers, _OWN)
    codes[list(having if layers is None else layers)] = code
    return codes


def _read(
    runs: list[tuple[int, int]], memory: tuple, undisturbed: tuple, code: Int[Array, "layers"]
) -> tuple:
    """Select what each layer reads: the clip's memory, its twin's undisturbed one, or zeros."""
    seen = []
    for (start, stop), own, theirs in zip(runs, memory, undisturbed, strict=True):
        choose = functools.partial(_choose, code[start:stop])
        seen.append(jax.tree.map(choose, own, theirs))
    return tuple(seen)


def _choose(code: Int[Array, "layers"], own: Array, theirs: Array) -> Array:
    """Select one array of a run's memories, [layers, B, ...]."""
    code = code.reshape(-1, *(1,) * (own.ndim - 1))
    return jnp.where(code == _OWN, own, jnp.where(code == _TWIN, swap_twins(theirs, axis=1), 0))


def swap_twins(x: Array, axis: int = 0) -> Array:
    """Swap neighbors along an axis of even length."""
    shape = x.shape
    pairs = x.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
    return jnp.flip(pairs, axis + 1).reshape(shape)


def twin_noise(key: Array, shape: tuple[int, ...]) -> Array:
    """Draw standard normal noise for a batch of twins, the same for both clips of a pair."""
    return jnp.repeat(draw_noise(key, (shape[0] // 2, *shape[1:])), 2, axis=0)
