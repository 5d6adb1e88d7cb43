"""What a self-attention layer asks of its memory.

A self-attention layer is projections and a memory. The layer projects the tokens of the current
frame block; its memory decides what the block sees of the past and what is kept of it. State goes
in and comes out; a memory object holds parameters at most.
"""

from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float, Int

from arl2_jax.nn.rope import Rope


class Projections(NamedTuple):
    """What a layer knows of its tokens.

    Attributes:
      x: the layer's input, normalised and modulated, [B, n, C].
      q_raw, k_raw: projections before their norm, [B, n, C].
      q, k, v: heads of the normalised projections, [B, n, H, D], not yet rotated.
      q_scale, k_scale: scales of the norms over the full width, [C] float32.
      rope: rotary positions of a block, or of a clip, or None.
    """

    x: Float[Array, "b n c"]
    q_raw: Float[Array, "b n c"]
    k_raw: Float[Array, "b n c"]
    q: Float[Array, "b n h d"]
    k: Float[Array, "b n h d"]
    v: Float[Array, "b n h d"]
    q_scale: Float[Array, "c"]
    k_scale: Float[Array, "c"]
    rope: Rope | None

    def first_of(self, copies: int) -> "Projections":
        """The first of every `copies` neighbours in the batch."""
        first = lambda x: x.reshape(-1, copies, *x.shape[1:])[:, 0]
        names = ("x", "q_raw", "k_raw", "q", "k", "v")
        return self._replace(**{name: first(getattr(self, name)) for name in names})


class Memory(Protocol):
    """What a block sees of the past, and what is kept of it.

    `attend_clip` equals `init_state`, then `attend` and `write` block by block.
    """

    def init_state(self, batch: int, capacity: int) -> Any:
        """The empty state, a pytree of arrays; `capacity` counts tokens."""
        ...

    def attend(
        self, p: Projections, state: Any, position: int | Int[Array, ""]
    ) -> Float[Array, "b n h d"]:
        """Output of a block whose first token has index `position`; reads the state."""
        ...

    def write(self, p: Projections, state: Any, position: int | Int[Array, ""]) -> Any:
        """The state after a clean block whose first token has index `position`."""
        ...

    def attend_clip(
        self, p: Projections, blocks: int, copies: int
    ) -> tuple[Float[Array, "b n h d"], dict[str, Array]]:
        """Outputs of all blocks of a clip at once, and diagnostics (float32 scalars).

        With copies = 2 every clip is in the batch twice, a clean copy and next to it a noisy one:
        what is remembered comes from clean blocks alone, and a block sees earlier clean blocks and
        itself. With copies = 1 the clip is its own past.
        """
        ...
