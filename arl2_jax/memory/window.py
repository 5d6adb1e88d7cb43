"""Softmax over the first and the last frames of a video: a state of fixed size."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from arl2_jax.config import AttentionConfig, WindowConfig
from arl2_jax.memory.clip_attention import Blocks, append_own
from arl2_jax.memory.interface import Projections, Room
from arl2_jax.memory.softmax_cache import CacheState
from arl2_jax.nn.attention import partial_attention
from arl2_jax.nn.positions import TokenGrid
from arl2_jax.nn.rope import rotate
from arl2_jax.sharding import BLOCKS, CLIPS, HEADS, constrain, per_device
from pallas_kernels import dot_product_attention, merge_attention

Slots = Float[Array, "*layers b slots h d"]


class WindowState(NamedTuple):
    """Keys, rotated by their absolute positions, and values.

    Attributes:
      sink_k, sink_v: of the first frames of the video, [B, sink N, H, D].
      k, v: of the last frames before the block, a ring of slots, [B, R N, H, D].
    """

    sink_k: Float[Array, "*layers b sink h d"]
    sink_v: Float[Array, "*layers b sink h d"]
    k: Slots
    v: Slots


class Window(nnx.Module):
    """A block sees the first `sink` frames of the video and the last `frames`, its own included.

    Positions are those of a video that consists of the visible frames alone: once frames have been
    dropped, the sink is placed right before the window. Rotary attention depends only on
    differences of positions. So the keys are not changed, and a block attends to the sink with
    queries rotated as if it were that close. Differences stay below sink + frames for any length of
    the video, and no stored key or value is copied or changed.

    Frame t is kept in slot t of the sink, or in slot (t - sink) mod R of the ring.
    """

    bounded = True
    stacked = True
    gathers = False

    def __init__(self, settings: WindowConfig, cfg: AttentionConfig, *, rngs: nnx.Rngs):
        del rngs  # no parameters
        self.sink, self.frames = settings.sink, settings.frames
        self.heads, self.head_dim, self.dtype = cfg.num_heads, cfg.head_dim, jnp.dtype(cfg.dtype)

    def init_state(self, batch: int, room: Room) -> WindowState:
        """Return zeroed slots for sink + frames - frames_per_block latent frames."""
        self._check(room.frames_per_block)
        last = self.frames - room.frames_per_block
        slots = lambda frames: jnp.zeros(
            (batch, frames * room.tokens_per_frame, self.heads, self.head_dim), self.dtype
        )
        return WindowState(slots(self.sink), slots(self.sink), slots(last), slots(last))

    def attend(self, p: Projections, state: WindowState, grid: TokenGrid):
        """Attend to sink, last frames and the block itself; no aux."""
        self._check(grid.frames)
        rope, last = grid.rotation(), self.frames - grid.frames
        q, k = rotate(p.q, rope), rotate(p.k, rope)
        parts = [partial_attention(q, k, p.v)]
        if self.sink:
            near = grid.rotation(jnp.minimum(grid.first_frame, self.sink + last))
            visible = jnp.minimum(grid.first_frame, self.sink) * grid.tokens_per_frame
            queries = rotate(p.q, near)
            parts.append(
                partial_attention(queries, state.sink_k, state.sink_v, visible, grid.layer)
            )
        if last:
            visible = jnp.clip(grid.first_frame - self.sink, 0, last) * grid.tokens_per_frame
            parts.append(partial_attention(q, state.k, state.v, visible, grid.layer))
        return merge_attention(parts)[0], None

    def entries(self, p: Projections, grid: TokenGrid) -> CacheState:
        """Return rotated keys, and values, of the block."""
        return CacheState(rotate(p.k, grid.rotation()).astype(self.dtype), p.v.astype(self.dtype))

    def put(self, entries: CacheState, state: WindowState, grid: TokenGrid) -> WindowState:
        """Keep the block's frames, each in its slot."""
        last = self.frames - grid.frames
        t = grid.first_frame + jnp.arange(grid.frames)
        # Frames that are stored elsewhere, or leave the window at once, have slots past the end.
        sink = jnp.where(t < self.sink, t, self.sink + t)
        stays = (t >= self.sink) & (jnp.arange(grid.frames) >= grid.frames - last)
        ring = jnp.where(stays, (t - self.sink) % max(last, 1), last + jnp.arange(grid.frames))
        return WindowState(
            _write_frames(state.sink_k, entries.k, sink, grid),
            _write_frames(state.sink_v, entries.v, sink, grid),
            _write_frames(state.k, entries.k, ring, grid),
            _write_frames(state.v, entries.v, ring, grid),
        )

    def write(self, p: Projections, aux: None, state: WindowState, grid: TokenGrid) -> WindowState:
        """Return one layer's state with the block."""
        del aux
        return self.put(self.entries(p, grid), state, grid)

    def attend_clip(self, p: Projections, grid: TokenGrid, blocks: int, copies: int):
        """Attend in all blocks at once, for a clip at the beginning of its video."""
        self._check(grid.frames // blocks)
        by_block = PartitionSpec(CLIPS, None, BLOCKS, None, HEADS)
        by_head = PartitionSpec(CLIPS, None, None, None, (HEADS, BLOCKS))
        split = lambda x: constrain(
            x.reshape(-1, copies, blocks, x.shape[1] // blocks, *x.shape[2:]), by_block
        )
        rope = grid.rotation()
        q, k, v = map(split, (rotate(p.q, rope), rotate(p.k, rope), p.v))
        sink_k = self._sink_keys(p.first_of(copies).k, grid, blocks)
        attend = lambda *arrays: _attend_windows(
            *arrays, frames=grid.frames // blocks, sink=self.sink, window=self.frames
        )
        # Sharded by heads, with whole clips on a device, as in `SoftmaxCache`.
        sink = PartitionSpec(CLIPS, None, None, (HEADS, BLOCKS))
        out = per_device(attend, (by_head, by_head, by_head, sink), by_head)(q, k, v, sink_k)
        return constrain(out, by_block).reshape(p.q.shape), {}

    def _check(self, block: int) -> None:
        if self.frames < block:
            raise ValueError(
                f"frames={self.frames} of the window must be at least the {block} frames of a "
                "block; raise it"
            )

    def _sink_keys(
        self, k: Float[Array, "b n h d"], grid: TokenGrid, blocks: int
    ) -> Float[Array, "b blocks sink h d"]:
        """Return the sink's keys as each block of a clip sees them: right before its window."""
        block, frames = grid.frames // blocks, min(self.sink, grid.frames)
        sink = dataclasses.replace(grid, frames=frames)
        ahead = [max(i * block - (self.sink + self.frames - block), 0) for i in range(blocks)]
        k = k[:, : frames * grid.tokens_per_frame]
        return jnp.stack([rotate(k, sink.rotation(shift)) for shift in ahead], axis=1)


def _attend_windows(
    q: Blocks,
    k: Blocks,
    v: Blocks,
    sink_k: Float[Array, "b blocks sink h d"],
    *,
    frames: int,
    sink: int,
    window: int,
) -> Blocks:
    """Attend from every block of `frames` frames to the sink, the last clean frames and itself."""
    n = q.shape[3] // frames
    clean_k, clean_v = (x[:, 0].reshape(len(x), -1, *x.shape[4:]) for x in (k, v))
    outputs = []
    for i in range(q.shape[2]):
        first = i * frames
        kept = min(sink, first) * n
        last = slice(max(min(sink, first), first - (window - frames)) * n, first * n)
        past_k = jnp.concatenate([sink_k[:, i, :kept], clean_k[:, last]], axis=1)
        past_v = jnp.concatenate([clean_v[:, :kept], clean_v[:, last]], axis=1)
        queries = q[:, :, i].reshape(-1, *q.shape[3:])
        seen = (append_own(past_k, k[:, :, i]), append_own(past_v, v[:, :, i]))
        outputs.append(dot_product_attention(queries, *seen))
    return jnp.stack(outputs, axis=1).reshape(q.shape)


def _write_frames(
    slots: Slots, x: Float[Array, "*layers b n h d"], frames: Int[Array, "f"], grid: TokenGrid
) -> Slots:
    """Write each frame of x to its place among the frames of the slots; drop those past the end."""
    if slots.shape[-3] == 0:
        return slots
    split = lambda y: y.reshape(*y.shape[:-3], -1, grid.tokens_per_frame, *y.shape[-2:])
    place = (*(slice(None),) * (slots.ndim - 3), frames)
    return (
        split(slots).at[place].set(split(x), mode="drop", unique_indices=True).reshape(slots.shape)
    )
