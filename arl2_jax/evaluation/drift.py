"""Drift: where a long rollout loses the sprites of its past."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from arl2_jax.codecs import Codec
from arl2_jax.config import Config, SpriteConfig
from arl2_jax.data.sprites import HELD_OUT_SEED, SpriteClip, make_clip
from arl2_jax.evaluation.lanes import Lanes, lanes_of, read_lanes
from arl2_jax.evaluation.recall import NOTHING, wilson
from arl2_jax.text import embed_caption

# Seeds that no other held-out clips have.
_FIRST_SEED = HELD_OUT_SEED + 2**41


class Beginnings(NamedTuple):
    """Beginnings of held-out clips, which a model is given.

    Attributes:
      clips: the clips, as long as the given beginning.
      lanes: their lanes.
      batch: "latents" [N, given frames, rows, columns, channels] and "text".
    """

    clips: list[SpriteClip]
    lanes: Lanes
    batch: dict[str, np.ndarray]


class Readings(NamedTuple):
    """Sprites read from a rollout of M blocks.

    Attributes:
      identities: reading of every lane in every block, see `arl2_jax.evaluation.lanes.read_lanes`.
      frames: block -> its last frame, for the first few videos.
    """

    identities: Int[np.ndarray, "blocks clips lanes"]
    frames: dict[int, UInt8[np.ndarray, "clips height width 3"]]


def beginnings(config: Config, codec: Codec, count: int, blocks: int) -> Beginnings:
    """Make the first blocks of held-out clips.

    Sprites are fully visible at first, so that each has been seen.

    Args:
      config: the run, on synthetic clips.
      codec: encodes pixels to latents.
      count: number of clips.
      blocks: frame blocks of each.
    """
    model = config.model
    frames = codec.pixel_frames(blocks * model.frames_per_block)
    clips = [true_clip(config, i, frames) for i in range(count)]
    pixels = np.stack([clip.video for clip in clips]).astype(np.float32) / 127.5 - 1
    text = [embed_caption(clip.caption, model.text_len, model.text_dim) for clip in clips]
    batch = {"latents": np.asarray(codec.encode(pixels)), "text": np.stack(text)}
    return Beginnings(clips, lanes_of(clips, config.data.sprites), batch)


def true_clip(
    config: Config, index: int, frames: int, identity: Sequence[tuple[int, int]] | None = None
) -> SpriteClip:
    """Make a clip of any length whose first frames are those of `beginnings`.

    Args:
      config: the run.
      index: number of the clip.
      frames: pixel frames.
      identity: see `arl2_jax.data.sprites.make_clip`.
    """
    data = dataclasses.replace(config.data, frames=frames)
    return make_clip(config.data.sprites, data, _FIRST_SEED + index, identity)


def true_blocks(
    clips: Sequence[SpriteClip], block: int, first: int = 0
) -> Iterator[Float[np.ndarray, "clips frames height width 3"]]:
    """Yield the pixels of clips in [-1, 1], one frame block after the other.

    Args:
      clips: clips of equal length.
      block: frames of a block.
      first: frame to begin with.
    """
    for start in range(first, len(clips[0].video), block):
        video = np.stack([clip.video[start : start + block] for clip in clips])
        yield video.astype(np.float32) / 127.5 - 1


def read_rollout(
    blocks: Iterable[Array | np.ndarray],
    codec: Codec,
    lanes: Lanes,
    sprites: SpriteConfig,
    *,
    kept: Sequence[int] = (),
    videos: int = 4,
) -> Readings:
    """Read the blocks of a rollout as they come; memory does not grow with their number.

    Args:
      blocks: latents [N, f, rows, columns, channels] of one block after the other.
      codec: a codec that decodes each frame by itself.
      lanes, sprites: as in `read_lanes`.
      kept: blocks whose last frame is kept.
      videos: number of videos whose frames are kept.
    """
    read = jax.jit(lambda latents: _decode_and_read(codec, latents, lanes, sprites))
    found, frames = [], {}
    for i, block in enumerate(blocks):
        identities, last = read(block)
        found.append(identities)
        if i in kept:
            shown = np.clip(np.rint((np.asarray(last[:videos]) + 1) * 127.5), 0, 255)
            frames[i] = shown.astype(np.uint8)
        if i % 16 == 15:
            # Bounds the number of pending results on the device.
            found = [np.asarray(x, np.int8) for x in found]
    return Readings(np.stack([np.asarray(x, np.int8) for x in found]), frames)


def _decode_and_read(codec: Codec, latents: Array, lanes: Lanes, sprites: SpriteConfig):
    pixels = codec.decode(latents)
    return read_lanes(pixels, lanes, sprites), pixels[:, -1]


def drift_scores(
    identities: Int[np.ndarray, "blocks clips lanes"],
    wanted: Int[np.ndarray, "clips lanes"],
    edges: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Compute shares of what a rollout shows, by block number.

    Args:
      identities: readings, as in `Readings`.
      wanted: identities of the past, as in `Lanes`.
      edges: first block of each part, from 0; by default 0, 1, 3, 7, 15, ...

    Returns:
      For each part "blocks" [first, last]; "seen", the share of lanes and blocks in which a whole
      sprite is seen; "nothing", the share in which none is; "right", the share of seen sprites that
      are those of the past, its "interval", the number of "videos" with any, and the "count" of
      sprites. "returns" and "same" have the same fields for sprites that come back, whole after a
      block in which none was seen: the share that is that of the past, and the share that is what
      the lane showed last. A share of zero sprites is None. Intervals count videos, as the lanes
      and blocks of one video are not independent.
    """
    blocks = len(identities)
    known = np.broadcast_to(wanted != NOTHING, identities.shape)
    seen = (identities >= 0) & known
    right = seen & (identities == wanted)
    back, shown = returns(identities, wanted)
    scores = []
    for first, last in _parts(blocks, edges):
        part = np.s_[first : last + 1]
        shares = _shares(seen[part], right[part])
        scores.append(
            {
                "blocks": [first, last],
                "seen": float(seen[part].sum() / known[part].sum()),
                "nothing": float(
                    ((identities[part] == NOTHING) & known[part]).sum() / known[part].sum()
                ),
            }
            | shares
            | {"returns": _shares(back[part], right[part] & back[part])}
            | {"same": _shares(back[part], (identities == shown)[part] & back[part])}
        )
    return scores


def returns(
    identities: Int[np.ndarray, "blocks clips lanes"], wanted: Int[np.ndarray, "clips lanes"]
) -> tuple[Bool[np.ndarray, "blocks clips lanes"], Int[np.ndarray, "blocks clips lanes"]]:
    """Find where sprites come back: whole ones after a block in which their lane was empty.

    Args:
      identities: readings of the blocks, as in `Readings`; before them all sprites were visible.
      wanted: identities of the past, as in `Lanes`.

    Returns:
      Whether a sprite comes back, and which one its lane showed last.
    """
    shown, gone = np.array(wanted), np.zeros(wanted.shape, bool)
    back, last = np.zeros(identities.shape, bool), np.empty_like(identities)
    for i, now in enumerate(identities):
        seen = (now >= 0) & (wanted != NOTHING)
        back[i], last[i] = seen & gone, shown
        shown = np.where(seen, now, shown)
        gone = (now == NOTHING) | (gone & ~seen)
    return back, last


def _parts(blocks: int, edges: Sequence[int] | None) -> list[tuple[int, int]]:
    if edges is None:
        edges = [2**i - 1 for i in range(blocks.bit_length())]
    starts = [edge for edge in edges if edge < blocks]
    return list(zip(starts, [*(s - 1 for s in starts[1:]), blocks - 1], strict=True))


def _shares(asked: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Compute the share of `asked` that is right; both are [blocks, videos, lanes]."""
    count, videos = int(asked.sum()), int(asked.any(axis=(0, 2)).sum())
    share = float(right.sum() / count) if count else None
    interval = None if share is None else wilson(share, videos)
    return {"right": share, "interval": interval, "videos": videos, "count": count}
