"""Division of blocks into segments of chunks, which run in parallel."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.gated_delta.gpu.tiles import CHUNK, SLICE

_MULTIPROCESSORS = 132  # of an H100 or H200
# Microseconds on an H200: of a step of `maps` with up to two programs on a multiprocessor, or
# three; of a step of `fold`; of a chunk of `gradients` with one program there, or two.
_MAPS = (1.5, 2.1)
_FOLD = 1.8
_GRADIENTS = (11.8, 17.0)


class Segments(NamedTuple):
    """Division of blocks into segments of `each` chunks, the last with the remainder."""

    each: int
    chunks: int  # of a block
    blocks: int  # of all sequences
    sequence: int  # blocks of a sequence

    @property
    def count(self) -> int:
        """Number of segments of a block."""
        return -(-self.chunks // self.each)

    @property
    def lengths(self) -> list[int]:
        """Number of chunks of each segment of a block."""
        others = self.count - 1
        return [self.each] * others + [self.chunks - others * self.each]


class Walk(NamedTuple):
    """The chunks of one segment, in the order in which a program takes them."""

    place: Any  # of the segment among those of all sequences
    sequence: Any
    number: Any  # of the segment in its sequence
    block: Any
    first: Any
    count: Any
    reverse: bool

    def at(self, step: Any) -> Any:
        """Return the chunk of a step."""
        return self.first + (self.count - 1 - step if self.reverse else step)


def walk(segments: Segments, i: Any, *, reverse: bool = False) -> Walk:
    """Return the walk of segment i; first come the first (longest) segments of all blocks."""
    each = segments.each
    block, segment = lax.rem(i, segments.blocks), lax.div(i, segments.blocks)
    place = block * segments.count + segment
    of_sequence = segments.sequence * segments.count
    return Walk(
        place,
        lax.div(place, of_sequence),
        lax.rem(place, of_sequence),
        block,
        segment * each,
        jnp.minimum(each, segments.chunks - segment * each),
        reverse,
    )


def plan_segments(k: Array, v: Array, batch: int, *, backward: bool) -> Segments:
    """Choose the segments for which the kernels take the least estimated time.

    Args:
        k: Keys [N, block, H, K].
        v: Values [N, block, H, V].
        batch: Sequences.
        backward: Whether to include the time of the backward pass.
    """
    blocks, block, heads, key_dim = k.shape
    chunks = -(-block // CHUNK)
    programs = blocks * heads * (v.shape[3] + key_dim) // SLICE
    unneeded = batch * heads * key_dim // SLICE  # maps A of first segments

    def time(segments: Segments) -> float:
        lengths, others = segments.lengths, segments.count - 1
        numbers = [programs - unneeded] + [programs] * others
        three = sum(numbers) > 2 * _MULTIPROCESSORS
        jobs = zip(lengths, numbers, strict=True)
        forward = _MAPS[three] * makespan(jobs, (2 + three) * _MULTIPROCESSORS)
        folding = _FOLD * (segments.count * blocks / batch - 1)
        if not backward:
            return forward + folding
        two = blocks * heads * segments.count > _MULTIPROCESSORS
        walks = [(length, blocks * heads) for length in lengths]
        walking = _GRADIENTS[two] * makespan(walks, (1 + two) * _MULTIPROCESSORS)
        return forward + 2 * folding + walking

    lengths = range(chunks, 0, -max(1, chunks // 128))  # only some for very long blocks
    plans = (Segments(each, chunks, blocks, blocks // batch) for each in lengths)
    return min(plans, key=time)


def makespan(jobs: Iterable[tuple[int, int]], servers: int) -> int:
    """Return the makespan of (length, number) jobs, started in order on `servers` servers."""
    free = {0: servers}  # servers by the time from which they are free
    for length, number in jobs:
        while number:
            now = min(free)
            started = min(number, free[now])
            free[now] -= started
            if not free[now]:
                del free[now]
            free[now + length] = free.get(now + length, 0) + started
            number -= started
    return max(free)
