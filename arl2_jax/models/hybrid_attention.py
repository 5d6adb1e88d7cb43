"""ARL2's attention as a stand-alone module, for other models."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from arl2_jax.config import AttentionConfig, GatedDeltaConfig, MemorySpec
from arl2_jax.memory import Room, TrainableMemory, make_memory
from arl2_jax.models.attention import SelfAttention
from arl2_jax.nn.positions import TokenGrid, given_rotations
from arl2_jax.nn.rope import Rope

Positions = TokenGrid | Rope | None


class HybridAttention(nnx.Module):
    """Self-attention that runs block by block over a state: softmax inside a block, memory across.

    `scan` is the method by definition: a `jax.lax.scan` of `step` over the blocks of a sequence.
    `clip` computes the same for all blocks at once, for training.

    Args:
      dim: model width C.
      num_heads: heads H.
      head_dim: width D of a head, even; by default C / H.
      memory: kind and settings; by default the gated delta state.
      lora_rank, lora_alpha: low-rank updates of the gated delta memory.
      eps: epsilon of the norms of queries and keys.
      dtype: compute type; parameters and the gated delta state stay float32.
      rngs: source of the initial parameters.

    Raises:
      ConfigError: a size is impossible, or the memory is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        head_dim: int | None = None,
        memory: MemorySpec | None = None,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        eps: float = 1e-6,
        dtype: str = "float32",
    ):
        cfg = AttentionConfig(
            dim,
            num_heads,
            dim // num_heads if head_dim is None else head_dim,
            eps=eps,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
        )
        spec = MemorySpec("gated_delta", GatedDeltaConfig()) if memory is None else memory
        self.self_attn = SelfAttention(cfg, rngs=rngs)
        self.memory = make_memory(spec, cfg, rngs=rngs)
        self.head_dim = cfg.head_dim

    def init_state(self, batch: int, room: Room | None = None):
        """Return the empty state; that of the gated delta memory is [B, H, D, D] float32.

        Args:
          batch: sequences.
          room: for memories that need to know it: blocks are `room.frames_per_block` frames of
            `room.tokens_per_frame` tokens.
        """
        if not self.memory.bounded and (room is None or room.frames is None):
            raise ValueError(
                f"{type(self.memory).__name__} must know how many frames to hold; pass room"
            )
        return self.memory.init_state(batch, Room(None, 1, 1) if room is None else room)

    def step(self, x: Float[Array, "b n c"], state, positions: Positions = None):
        """Attend in one block and write it: (output [B, n, C], state after the block).

        Args:
          x: tokens of the block.
          state: from `init_state` or an earlier call.
          positions: of the tokens, a `sequence_grid` or `video_grid`; or their rotations, which is
            all that the gated delta memory needs; by default no rotation.
        """
        p, grid = self.self_attn.project(x), self._grid(positions, x.shape[1])
        out, aux = self.memory.attend(p, state, grid)
        return self.self_attn.output(out), self.memory.write(p, aux, state, grid)

    def __call__(self, x: Float[Array, "b n c"], state, positions: Positions = None):
        """Attend in one block: output [B, n, C]. The state is read, not changed."""
        p, grid = self.self_attn.project(x), self._grid(positions, x.shape[1])
        return self.self_attn.output(self.memory.attend(p, state, grid)[0])

    def write(self, x: Float[Array, "b n c"], state, positions: Positions = None):
        """Return the state after a block; `step` attends as well, with one projection for both."""
        return self.step(x, state, positions)[1]

    def scan(self, x: Float[Array, "b n c"], block_size: int, positions: Positions = None):
        """Run `step` over the blocks of a sequence: output [B, n, C].

        This is the definition of the method. It keeps one block's activations at a time.

        Args:
          x: tokens of whole blocks.
          block_size: tokens of a block.
          positions: of all tokens, as in `step`.

        Raises:
          ValueError: block_size does not divide n.
        """
        blocks, grid = self._sequence(x, block_size, positions)
        room = Room(grid.frames, grid.tokens_per_frame, grid.frames // blocks)

        def block(state, inputs):
            index, x = inputs
            out, state = self.step(x, state, grid.block(index, blocks))
            return state, out

        split = rearrange(x, "b (m n) c -> m b n c", m=blocks)
        state = self.init_state(len(x), room)
        _, out = jax.lax.scan(block, state, (jnp.arange(blocks), split))
        return rearrange(out, "m b n c -> b (m n) c")

    def clip(self, x: Float[Array, "b n c"], block_size: int, positions: Positions = None):
        """Return what `scan` does, computed for all blocks at once; for training.

        Raises:
          ValueError: block_size does not divide n, or the memory has no form for clips.
        """
        blocks, grid = self._sequence(x, block_size, positions)
        if not isinstance(self.memory, TrainableMemory):
            raise ValueError(f"{type(self.memory).__name__} has no attend_clip; use scan")
        out, _ = self.memory.attend_clip(self.self_attn.project(x), grid, blocks, copies=1)
        return self.self_attn.output(out)

    def _grid(self, positions: Positions, tokens: int, start: int | None = None) -> TokenGrid:
        if not isinstance(positions, TokenGrid):
            return given_rotations(positions, tokens, self.head_dim, start=start)
        found = positions.frames * positions.tokens_per_frame
        if (found, positions.head_dim) != (tokens, self.head_dim):
            raise ValueError(
                f"positions are of {found} tokens and head_dim={positions.head_dim}; must be of "
                f"the {tokens} tokens of x and head_dim={self.head_dim}"
            )
        return positions

    def _sequence(self, x: Array, block_size: int, positions: Positions) -> tuple[int, TokenGrid]:
        """Return the number of blocks of a sequence, and its positions, which begin at 0."""
        if block_size < 1 or x.shape[1] % block_size:
            raise ValueError(
                f"block_size={block_size} must divide the {x.shape[1]} tokens of x; pad or cut x"
            )
        grid, blocks = self._grid(positions, x.shape[1], start=0), x.shape[1] // block_size
        if isinstance(grid.start, int) and grid.start:
            raise ValueError(
                f"positions begin at frame {grid.start}; must begin at 0, for nothing is remembered"
            )
        grid.block(0, blocks)  # blocks are whole frames
        return blocks, grid
