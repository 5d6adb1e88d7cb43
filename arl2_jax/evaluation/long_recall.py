"""Recall in true videos of any length: does a memory still remember after many blocks?

A long rollout that loses its sprites may have forgotten them, or may have drawn them wrong and
remembered that. Here all that a model writes to its memory is true, which rules out the second.
"""

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from arl2_jax.codecs import Codec
from arl2_jax.config import Config, SamplerConfig
from arl2_jax.evaluation.drift import returns, true_blocks, true_clip
from arl2_jax.evaluation.gap import Model
from arl2_jax.evaluation.lanes import lanes_of, read_lanes
from arl2_jax.evaluation.recall import wilson
from arl2_jax.generation import rollout
from arl2_jax.text import embed_caption


class Stretch(NamedTuple):
    """A range of blocks of a video that are drawn.

    Attributes:
      first, last: block numbers from 0; `last` is included.
    """

    first: int
    last: int


def long_recall(
    config: Config,
    codec: Codec,
    model: Model,
    key: Array,
    *,
    videos: int,
    stretches: Sequence[Stretch],
) -> list[dict[str, Any]]:
    """Measure recall of sprites that come back, after few and after many true blocks.

    Args:
      config: the run, on synthetic clips whose sprites keep to lanes.
      codec: a codec that decodes each frame by itself.
      model: the model.
      key: random key.
      videos: held-out videos, those of `arl2_jax.evaluation.drift.beginnings`.
      stretches: blocks to draw, in order; sprites that come back within one count.

    Returns:
      For each stretch "blocks" [first, last], the "count" of the sprites that come back there and
      the number of "videos" they are in; of these "recall", the share that is drawn right, and its
      "interval"; "other", the share in whose place a whole sprite of another identity is drawn.
      The rest is not drawn, or only in part.
    """
    f, blocks = config.model.frames_per_block, max(part.last for part in stretches) + 1
    clips = [true_clip(config, i, blocks * f) for i in range(videos)]
    lanes, shown = lanes_of(clips, config.data.sprites), []
    read = jax.jit(lambda pixels: read_lanes(pixels, lanes, config.data.sprites))

    def latents() -> Iterator[Array]:
        for pixels in true_blocks(clips, f):
            shown.append(np.asarray(read(pixels)))
            yield codec.encode(pixels)

    asked = {i for part in stretches for i in range(part.first, part.last + 1)}
    text = [embed_caption(c.caption, config.model.text_len, config.model.text_dim) for c in clips]
    drawn = draw_along(model, config.sampler, np.stack(text), latents(), asked, blocks, key)
    readings = {i: np.asarray(read(codec.decode(block))) for i, block in drawn}
    return long_recall_scores(np.stack(shown), readings, np.asarray(lanes.identities), stretches)


def draw_along(
    model: Model,
    sampler: SamplerConfig,
    text: Array | np.ndarray,
    blocks: Iterable[Array],
    asked: Collection[int],
    count: int,
    key: Array,
) -> Iterator[tuple[int, Array]]:
    """Draw some blocks of videos, each after all true blocks before it.

    Args:
      model: the model; memory does not grow with the videos if all of its layers are hybrid.
      sampler: how blocks are drawn and written.
      text: embeddings [B, L, text_dim].
      blocks: latents [B, f, rows, columns, channels] of one block after the other.
      asked: numbers of the blocks to draw, from 0.
      count: blocks that softmax caches have room for.
      key: random key; that of a block follows from it and from the block's number.

    Yields:
      Number and latents of each drawn block, float32.
    """
    params, cfg = model
    state = context = None
    for i, block in enumerate(blocks):
        block = jnp.asarray(block)
        own = jax.random.fold_in(key, i)
        if state is None:
            patches = cfg.patch_size[1] * cfg.patch_size[2]
            context, state = rollout.init_rollout(
                params, cfg, sampler, jnp.asarray(text), own,
                frames=count * cfg.frames_per_block,
                tokens_per_frame=block.shape[2] * block.shape[3] // patches,
            )  # fmt: skip
        memory, position, _ = state
        if i in asked:
            yield i, _draw(context, cfg, sampler, memory, position, own, block.shape)
        state = _write(context, cfg, sampler, memory, position, own, block)


# Memories are updated in place.
@functools.partial(jax.jit, static_argnames=("cfg", "sampler"), donate_argnames="memory")
def _write(context, cfg, sampler, memory, position, key, block):
    state = rollout.RolloutState(memory, position, key)
    return rollout.write_block(context, cfg, sampler, state, block)


@functools.partial(jax.jit, static_argnames=("cfg", "sampler", "shape"))
def _draw(context, cfg, sampler, memory, position, key, shape):
    state = rollout.RolloutState(memory, position, key)
    return rollout.denoise_block(context, cfg, sampler, state, shape)[1]


def long_recall_scores(
    shown: Int[np.ndarray, "blocks clips lanes"],
    drawn: Mapping[int, Int[np.ndarray, "clips lanes"]],
    wanted: Int[np.ndarray, "clips lanes"],
    stretches: Sequence[Stretch],
) -> list[dict[str, Any]]:
    """Compute the share of returning sprites that are drawn right, as in `long_recall`.

    Args:
      shown: readings of the true blocks, see `arl2_jax.evaluation.lanes.read_lanes`.
      drawn: number of a block -> readings of what was drawn in its place.
      wanted: identities of the sprites.
      stretches: blocks that were drawn.
    """
    back, scores = returns(shown, wanted)[0], []
    for part in stretches:
        numbers = range(part.first, part.last + 1)
        asked = np.stack([back[i] for i in numbers])
        found = np.stack([drawn[i] for i in numbers])
        whole, right = asked & (found >= 0), asked & (found == wanted)
        count, of = int(asked.sum()), int(asked.any(axis=(0, 2)).sum())
        share = float(right.sum() / count) if count else None
        scores.append({
            "blocks": [*part], "recall": share,
            "other": float((whole & ~right).sum() / count) if count else None,
            # Sprites of one video are not independent.
            "interval": None if share is None else wilson(share, of),
            "videos": of, "count": count,
        })  # fmt: skip
    return scores
