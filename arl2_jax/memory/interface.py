"""The interface of memories.

A self-attention layer is projections and a memory. The layer projects the tokens of the current
frame block; its memory decides what the block sees of the past and what is kept of it. State is
passed in and returned; a memory object has parameters at most.

A memory is made as `Memory(settings, cfg, rngs=rngs)`: the settings of its kind, the layer's
`AttentionConfig`, and a source of initial parameters. `Memory` is what generation needs;
`TrainableMemory` adds the form for training. Some methods are optional, and found by name:

    after_block(states, grid)     one decision over all layers that share a kind: takes and returns
                                  the states of their runs, each with a leading layer axis
    measure(p, grid, blocks)      how much of the past it keeps, see `memory.retention`

A memory whose settings name a second phase (`MemorySettings.next_phase`) has

    hand_over(states, room)       returns the initial states of the second phase's memory, from the
                                  states of all layers that share the specification: a list of their
                                  runs, each with a leading layer axis

The memory of the second phase has the same parameters.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Float

from arl2_jax.nn.positions import TokenGrid


class Projections(NamedTuple):
    """A layer's projections of its tokens.

    Attributes:
      x: the layer's input, normalised and modulated, [B, n, C].
      q_raw, k_raw: projections before their norm, [B, n, H D].
      q, k, v: heads of the normalised projections, [B, n, H, D], not yet rotated.
      q_scale, k_scale: scales of the norms over the full width, [H D] float32.
    """

    x: Float[Array, "b n c"]
    q_raw: Float[Array, "b n hd"]
    k_raw: Float[Array, "b n hd"]
    q: Float[Array, "b n h d"]
    k: Float[Array, "b n h d"]
    v: Float[Array, "b n h d"]
    q_scale: Float[Array, "hd"]
    k_scale: Float[Array, "hd"]

    def first_of(self, copies: int) -> "Projections":
        """Return the first (clean) of every `copies` neighbours in the batch."""
        first = lambda x: x.reshape(-1, copies, *x.shape[1:])[:, 0]
        names = ("x", "q_raw", "k_raw", "q", "k", "v")
        return self._replace(**{name: first(getattr(self, name)) for name in names})


class Room(NamedTuple):
    """The capacity that a memory may need.

    Attributes:
      frames: latent frames of the whole video; None if no end is known.
      tokens_per_frame: tokens of a latent frame.
      frames_per_block: latent frames of a frame block.
    """

    frames: int | None
    tokens_per_frame: int
    frames_per_block: int


@runtime_checkable
class Memory(Protocol):
    """What a block sees of the past, and what is kept of it.

    Attributes:
      bounded: whether the size of the state does not depend on the length of the video. Other
        memories are given `room.frames`.
      stacked: whether the memory is a `StackedMemory`.
      gathers: whether `attend` returns aux.
    """

    bounded: bool
    stacked: bool
    gathers: bool

    def init_state(self, batch: int, room: Room) -> Any:
        """Return the empty state of one layer, a pytree of arrays."""
        ...

    def attend(
        self, p: Projections, state: Any, grid: TokenGrid
    ) -> tuple[Float[Array, "b n h d"], Any]:
        """Return the output of a block, and aux; the state is read, not changed.

        aux is None, or a pytree of arrays that is summed over the passes of a block.
        """
        ...

    def write(self, p: Projections, aux: Any, state: Any, grid: TokenGrid) -> Any:
        """Return the state after a finished block.

        aux is the sum over all passes of the block, this one included.
        """
        ...


@runtime_checkable
class StackedMemory(Memory, Protocol):
    """A memory that reads large states of a run of equal layers in place.

    `attend` takes the states of all layers, each array with a leading layer axis, and the index
    `grid.layer`; or, without `grid.layer`, the state of one layer. Layers return their writes as
    entries, which are put into the states after the pass: no pass copies a state. `write` does both
    steps for one layer.
    """

    def entries(self, p: Projections, grid: TokenGrid) -> Any:
        """Return what one layer keeps of a finished block, a pytree of arrays."""
        ...

    def put(self, entries: Any, state: Any, grid: TokenGrid) -> Any:
        """Return the state with the entries; both of one layer, or both with a layer axis."""
        ...


@runtime_checkable
class TrainableMemory(Memory, Protocol):
    """A memory with a form for whole clips, equal to `attend` and `write` block by block."""

    def attend_clip(
        self, p: Projections, grid: TokenGrid, blocks: int, copies: int
    ) -> tuple[Float[Array, "b n h d"], dict[str, Array]]:
        """Return outputs of all blocks of a clip at once, and diagnostics (float32 scalars).

        With copies = 2 every clip is in the batch twice, a clean copy and next to it a noisy one:
        what is remembered comes from clean blocks alone, and a block sees earlier clean blocks and
        itself. With copies = 1 the clip is its own past.
        """
        ...
