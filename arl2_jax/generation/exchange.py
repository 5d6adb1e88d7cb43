"""One block drawn from memories that are exchanged between twin clips.

Which memory carries what a block knows of the past? Two clips are twins if they differ in what is
asked for and in nothing else. A clip whose block reads one memory of its twin, and all else of its
own, draws what that memory says.
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

# What is read of the one kind of memory that an exchange is about; of the other it is the own.
_OWN, _TWIN, _ZERO = range(3)
# Of each exchange: whether it is about the layers that conversion changed, or about the others.
_READ = {
    "none": (True, _OWN),
    "states": (True, _TWIN),
    "caches": (False, _TWIN),
    "zeroed": (True, _ZERO),
}
EXCHANGES = tuple(_READ)


class OfLayers(NamedTuple):
    """An exchange in some layers alone; the others read what is their own.

    Attributes:
      name: one of `EXCHANGES`.
      layers: indices of layers that have that kind of memory.
    """

    name: str
    layers: tuple[int, ...]


# In all layers that have the memory, or in some of them.
Exchange = str | OfLayers


def exchanges_of(cfg: ModelConfig) -> tuple[str, ...]:
    """Names of the exchanges that a model has the memories for, "none" first."""
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
    """Draws one block of each clip from noise after its clean past, under several exchanges.

    Neighbours in the batch are twins. The past is written block by block; then the block is drawn,
    which is remembered nowhere. Under an exchange every read, in either part, sees in the place of
    one kind of memory

      "none": nothing else, all are the clip's own;
      "states": its twin's states of the layers that conversion changed;
      "caches": its twin's caches, of all other layers;
      "zeroed": zeros as states.

    The twin's memories are those that the twin has with nothing exchanged. What a clip itself
    writes follows from what it has read: an identity that it no longer reads cannot reach it by
    way of another layer's memory. With sampler.context_noise, twins and exchanges share the noise
    with which the past is written.

    Args:
      params, cfg, sampler: as in `arl2_jax.generation.rollout.rollout`.
      text: text embeddings.
      keys: random keys [K]; each draws the block once, from the same noise under all exchanges.
        The first is also the source of the noise in the past.
      clips: clean latents, whole blocks; an even number of clips.
      block: index of the frame block to draw, may be traced.
      exchanges: those to make, names of `EXCHANGES`, or `OfLayers` for some layers alone.

    Returns:
      The drawn blocks for every exchange and key, float32.

    Raises:
      ValueError: an odd number of clips, an unknown exchange, or one of layers without the memory.
    """
    if len(clips) % 2:
        raise ValueError(f"{len(clips)} clips are given; twins come in pairs")
    f, tokens = cfg.frames_per_block, clips.shape[2] * clips.shape[3]
    context, empty = rollout.start(
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
    """What each layer reads under an exchange."""
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
    """What is read: the clip's memory, its twin's undisturbed one, or zeros, layer by layer."""
    seen = []
    for (start, stop), own, theirs in zip(runs, memory, undisturbed, strict=True):
        choose = functools.partial(_choose, code[start:stop])
        seen.append(jax.tree.map(choose, own, theirs))
    return tuple(seen)


def _choose(code: Int[Array, "layers"], own: Array, theirs: Array) -> Array:
    """One array of a run's memories, [layers, B, ...]."""
    code = code.reshape(-1, *(1,) * (own.ndim - 1))
    return jnp.where(code == _OWN, own, jnp.where(code == _TWIN, swap_twins(theirs, axis=1), 0))


def swap_twins(x: Array, axis: int = 0) -> Array:
    """Swaps neighbours along an axis of even length."""
    shape = x.shape
    pairs = x.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
    return jnp.flip(pairs, axis + 1).reshape(shape)


def twin_noise(key: Array, shape: tuple[int, ...]) -> Array:
    """Draw standard normal noise of a batch of twins, the same for both of a pair."""
    return jnp.repeat(draw_noise(key, (shape[0] // 2, *shape[1:])), 2, axis=0)
