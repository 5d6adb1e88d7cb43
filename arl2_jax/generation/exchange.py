"""One block drawn from memories that are exchanged between twin clips.

Which memory carries what a block knows of the past? Two clips are twins if they differ in what is
asked for and in nothing else. A clip whose block reads one memory of its twin, and all else of its
own, draws what that memory says.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from arl2_jax.config import ModelConfig, SamplerConfig
from arl2_jax.diffusion import draw_noise
from arl2_jax.generation import rollout

# What is read of (gated delta states, softmax caches).
_OWN, _TWIN, _ZERO = range(3)
_READ = {
    "none": (_OWN, _OWN),
    "states": (_TWIN, _OWN),
    "caches": (_OWN, _TWIN),
    "zeroed": (_ZERO, _OWN),
}
EXCHANGES = tuple(_READ)


def exchanges_of(cfg: ModelConfig) -> tuple[str, ...]:
    """Names of the exchanges that a model has the memories for, "none" first."""
    states = bool(cfg.hybrid_layers) and cfg.memory_gate == "learned"
    caches = len(cfg.hybrid_layers) < cfg.num_layers
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
    exchanges: tuple[str, ...] = ("none",),
) -> Float[Array, "e k b f rows columns channels"]:
    """Draws one block of each clip from noise after its clean past, under several exchanges.

    Neighbours in the batch are twins. The past is written block by block; then the block is drawn,
    which is remembered nowhere. Under an exchange every read, in either part, sees in the place of
    one kind of memory

      "none": nothing else, all are the clip's own;
      "states": the gated delta states of its twin;
      "caches": the softmax caches of its twin;
      "zeroed": gated delta states of zeros.

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
      exchanges: those to make, names of `EXCHANGES`.

    Returns:
      The drawn blocks for every exchange and key, float32.

    Raises:
      ValueError: an odd number of clips, or an unknown exchange.
    """
    if len(clips) % 2:
        raise ValueError(f"{len(clips)} clips are given; twins come in pairs")
    if unknown := [name for name in exchanges if name not in _READ]:
        raise ValueError(f"exchanges has {unknown}; known are {', '.join(EXCHANGES)}")
    f, tokens = cfg.frames_per_block, clips.shape[2] * clips.shape[3]
    context, empty = rollout.start(
        params, cfg, sampler, text, keys[0],
        frames=clips.shape[1],
        tokens_per_frame=tokens // (cfg.patch_size[1] * cfg.patch_size[2]),
    )  # fmt: skip
    made = ("none", *(name for name in exchanges if name != "none"))
    codes = jnp.array([_READ[name] for name in made])
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
            read = _read(cfg, memory, first, code)
            written = rollout.write_block(
                context, cfg, sampler, state, blocks[i], read=read, eps=eps
            )
            return written.memory

        return jax.lax.map(one, (memories, codes))

    memories = jax.lax.fori_loop(0, block, write, memories)
    first = jax.tree.map(lambda x: x[0], memories)

    def draw(exchange):
        memory, code = exchange
        read = _read(cfg, memory, first, code)

        def once(key):
            state = rollout.RolloutState(read, block * f, key)
            return rollout.denoise_block(context, cfg, sampler, state, blocks.shape[1:])[1]

        return jax.lax.map(once, keys)

    asked = jnp.array([made.index(name) for name in exchanges])
    return jax.lax.map(draw, jax.tree.map(lambda x: x[asked], (memories, codes)))


def _read(cfg: ModelConfig, memory: tuple, undisturbed: tuple, code: Int[Array, "2"]) -> tuple:
    """What is read: the clip's memory, its twin's undisturbed one, or zeros, by kind of memory."""
    seen = []
    for (start, _), own, theirs in zip(cfg.layer_runs(), memory, undisturbed, strict=True):
        of_kind = code[1 if cfg.memory_of(start) == "softmax_cache" else 0]
        choose = lambda x, y, c=of_kind: jnp.where(
            c == _OWN, x, jnp.where(c == _TWIN, swap_twins(y, axis=1), 0)
        )
        seen.append(jax.tree.map(choose, own, theirs))
    return tuple(seen)


def swap_twins(x: Array, axis: int = 0) -> Array:
    """Swaps neighbours along an axis of even length."""
    shape = x.shape
    pairs = x.reshape(*shape[:axis], shape[axis] // 2, 2, *shape[axis + 1 :])
    return jnp.flip(pairs, axis + 1).reshape(shape)


def twin_noise(key: Array, shape: tuple[int, ...]) -> Array:
    """Draw standard normal noise of a batch of twins, the same for both of a pair."""
    return jnp.repeat(draw_noise(key, (shape[0] // 2, *shape[1:])), 2, axis=0)
