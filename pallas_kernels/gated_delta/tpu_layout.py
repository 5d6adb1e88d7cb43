"""Tiling of the TPU kernels: a grid of batch entries, groups of heads, blocks and chunks.

The last two axes run in order, in the backward pass from the end, and carry a state in VMEM. Tokens
are not moved: [B, T, H, D] is read as [B, block, token, H D], heads as lane blocks. The last chunk
of a block may be ragged: memory past the end of the block is neither read nor written.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from pallas_kernels.gated_delta.plan import Plan

# Heads of a grid step at head dims of 128: enough independent products to hide their latency.
_HEADS = 12

# Of 128 MiB of a v5e or v6e and 64 MiB of the smallest; the compiler's own limit is 16 MiB.
_VMEM = 48 * 2**20


@dataclasses.dataclass(frozen=True)
class Layout:
    """Sizes of a call and of one grid step: `chunk` tokens of `group` heads."""

    batch: int
    blocks: int
    block_size: int
    heads: int
    key_dim: int
    value_dim: int
    chunk: int
    group: int
    reverse: bool

    @classmethod
    def of(cls, plan: Plan, k: Array, v: Array, *, reverse: bool = False) -> "Layout":
        """Return the layout for k [B, T, H, K] and v [B, T, H, V]; `reverse` walks backwards."""
        batch, time, heads, key_dim = k.shape
        value_dim = v.shape[-1]
        most = max(1, _HEADS * 128 * 128 // (key_dim * value_dim))
        group = max(n for n in range(1, heads + 1) if heads % n == 0 and n <= most)
        sizes = (batch, time // plan.block_size, plan.block_size, heads, key_dim, value_dim)
        # 128 tokens take fewer bundles than twice 64: benchmarks/results/tpu_schedules.json.
        return cls(*sizes, plan.chunk_size or 128, group, reverse)

    @property
    def chunks(self) -> int:
        """Number of chunks of a block."""
        return -(-self.block_size // self.chunk)

    @property
    def state(self) -> tuple[int, int]:
        """Shape of the state of one head."""
        return self.key_dim, self.value_dim

    def fold(self, k: Array, v: Array, g: Array, beta: Array) -> tuple[Array, ...]:
        """Fold k, v to [B, block, token, H D]; g, beta to [B, head group, block, token, head]."""
        features = (self.batch, self.blocks, self.block_size, -1)
        k, v = (x.reshape(features) for x in (k, v))
        g, beta = (jnp.moveaxis(x.reshape(*features, self.group), 3, 1) for x in (g, beta))
        return k, v, g, beta

    def unfold(self, k: Array, v: Array, g: Array, beta: Array) -> tuple[Array, ...]:
        """Undo `fold`."""
        tokens = (self.batch, self.blocks * self.block_size, self.heads)
        k, v = (x.reshape(*tokens, -1) for x in (k, v))
        g, beta = (jnp.moveaxis(x, 1, 3).reshape(tokens) for x in (g, beta))
        return k, v, g, beta

    def position(self) -> tuple[Any, Any]:
        """Return the block and the chunk of a grid step; inside a kernel."""
        return self._at(pl.program_id(2), pl.program_id(3))

    def first(self) -> Any:
        """Tell whether this is the first step that carries this state; inside a kernel."""
        return (pl.program_id(2) == 0) & (pl.program_id(3) == 0)

    def tokens(self) -> list[pl.BlockSpec]:
        """Return the block specs of a chunk of the folded k, v, g and beta."""

        def features(dim: int) -> pl.BlockSpec:
            shape = (None, None, self.chunk, self.group * dim)
            return pl.BlockSpec(shape, lambda b, h, *step: (b, *self._at(*step), h))

        gates = pl.BlockSpec(
            (None, None, None, self.chunk, self.group),
            lambda b, h, *step: (b, h, *self._at(*step), 0),
        )
        return [features(self.key_dim), features(self.value_dim), gates, gates]

    def carried_state(self) -> pl.BlockSpec:
        """Return the block spec of a state [B, H, K, V]."""
        return pl.BlockSpec((None, self.group, *self.state), lambda b, h, n, c: (b, h, 0, 0))

    def block_state(self, ahead: int = 0) -> pl.BlockSpec:
        """Return the block spec of states [B, blocks, H, K, V], `ahead` blocks later."""
        return pl.BlockSpec(
            (None, None, self.group, *self.state),
            lambda b, h, *step: (b, self._at(*step)[0] + ahead, h, 0, 0),
        )

    def chunk_matrix(self, rows: int, columns: int) -> pl.BlockSpec:
        """Return the block spec of matrices [B, blocks, chunks, H, rows, columns]."""
        return pl.BlockSpec(
            (None, None, None, self.group, rows, columns),
            lambda b, h, *step: (b, *self._at(*step), h, 0, 0),
        )

    def call(
        self,
        kernel: Callable[..., None],
        name: str,
        plan: Plan,
        inputs: Sequence[Array],
        in_specs: Sequence[pl.BlockSpec],
        outputs: Sequence[tuple[tuple[int, ...], DTypeLike, pl.BlockSpec]],
    ) -> Sequence[Array]:
        """Run kernel(layout, *inputs, *outputs, state), outputs given by (shape, dtype, spec)."""
        # Outputs vary over a device mesh as the tokens do.
        varying = jax.typeof(inputs[0]).mat
        return pl.pallas_call(
            partial(kernel, self),
            grid=(self.batch, self.heads // self.group, self.blocks, self.chunks),
            in_specs=in_specs,
            out_specs=[spec for _, _, spec in outputs],
            out_shape=[
                jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
                for shape, dtype, _ in outputs
            ],
            scratch_shapes=[pltpu.VMEM((self.group, *self.state), jnp.float32)],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
                vmem_limit_bytes=_VMEM,
            ),
            interpret=plan.interpret,
            name=name,
        )(*inputs)

    def _at(self, block: Any, chunk: Any) -> tuple[Any, Any]:
        if self.reverse:
            return self.blocks - 1 - block, self.chunks - 1 - chunk
        return block, chunk
