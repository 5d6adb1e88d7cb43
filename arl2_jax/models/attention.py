"""Self-attention as projections, cross-attention to text, and both joined with a memory."""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from arl2_jax.config import ModelConfig
from arl2_jax.memory import GatedDelta, Projections
from arl2_jax.nn.attention import attention
from arl2_jax.nn.linear import dot_general
from arl2_jax.nn.norm import RMSNorm
from arl2_jax.nn.rope import Rope


class AttentionProjections(nnx.Module):
    """The four linear layers of an attention, with RMSNorm on q and k over the full width."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        make = lambda: nnx.Linear(
            cfg.dim,
            cfg.dim,
            kernel_init=nnx.initializers.xavier_uniform(),
            dtype=jnp.dtype(cfg.dtype),
            dot_general=dot_general,
            rngs=rngs,
        )
        self.q, self.k, self.v, self.o = make(), make(), make(), make()
        self.norm_q, self.norm_k = (RMSNorm(cfg.dim, cfg.eps, rngs=rngs) for _ in range(2))
        self.num_heads = cfg.num_heads

    def heads(self, x: Float[Array, "b n c"]) -> Float[Array, "b n h d"]:
        """Splits the width into heads."""
        return rearrange(x, "b n (h d) -> b n h d", h=self.num_heads)


class SelfAttention(AttentionProjections):
    """Projections of a self-attention; what happens between them is the memory's affair."""

    def project(self, x: Float[Array, "b n c"], rope: Rope | None) -> Projections:
        """Projects normalised, modulated tokens."""
        q_raw, k_raw = self.q(x), self.k(x)
        return Projections(
            x=x,
            q_raw=q_raw,
            k_raw=k_raw,
            q=self.heads(self.norm_q(q_raw)),
            k=self.heads(self.norm_k(k_raw)),
            v=self.heads(self.v(x)),
            q_scale=self.norm_q.scale[...],
            k_scale=self.norm_k.scale[...],
            rope=rope,
        )

    def output(self, heads: Float[Array, "b n h d"]) -> Float[Array, "b n c"]:
        """Joins the heads and applies Wo."""
        return self.o(heads.reshape(*heads.shape[:2], -1))


class TextContext(NamedTuple):
    """Keys and values of the text for one layer, or stacked for many, [..., B, L, H, D]."""

    k: Float[Array, "*layers b l h d"]
    v: Float[Array, "*layers b l h d"]


class CrossAttention(AttentionProjections):
    """Attention to the text; all slots are attended, padding included, as in Wan."""

    def encode(self, text: Float[Array, "b l c"]) -> TextContext:
        """Keys and values of embedded text; they depend on the prompt alone."""
        return TextContext(self.heads(self.norm_k(self.k(text))), self.heads(self.v(text)))

    def __call__(self, x: Float[Array, "b n c"], text: TextContext) -> Float[Array, "b n c"]:
        """Attends from every token to all text slots."""
        # Copies of a clip stand next to each other and share its text.
        k, v = (jnp.repeat(t, len(x) // len(t), axis=0) for t in text)
        out = attention(self.heads(self.norm_q(self.q(x))), k, v)
        return self.o(out.reshape(x.shape))


class HybridAttention(nnx.Module):
    """ARL2's attention on its own, for other models: softmax inside a block, memory across.

    Args:
      dim: model width C.
      num_heads: heads H; C / H must be even.
      lora_rank, lora_alpha: low-rank updates of the memory branch.
      dtype: compute type; parameters and the state stay float32.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        dtype: str = "float32",
    ):
        cfg = ModelConfig(
            dim=dim,
            ffn_dim=dim,
            num_heads=num_heads,
            num_layers=1,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            dtype=dtype,  # pyright: ignore[reportArgumentType]
        )
        self.self_attn = SelfAttention(cfg, rngs=rngs)
        self.delta = GatedDelta(cfg, rngs=rngs)

    def init_state(self, batch: int) -> Float[Array, "b h k v"]:
        """The empty memory, [B, H, D, D] float32."""
        return self.delta.init_state(batch)

    def __call__(self, x: Float[Array, "b n c"], state, rope: Rope | None = None):
        """Output [B, n, C] of one block; reads the state and leaves it."""
        return self.self_attn.output(self.delta.attend(self.self_attn.project(x, rope), state))

    def write(self, x: Float[Array, "b n c"], state, rope: Rope | None = None):
        """The state after the block x."""
        return self.delta.write(self.self_attn.project(x, rope), state)

    def clip(self, x: Float[Array, "b t c"], block_size: int, rope: Rope | None = None):
        """Output [B, T, C] of all blocks at once; equal to `__call__` and `write` in turn.

        Raises:
          ValueError: block_size does not divide T.
        """
        if x.shape[1] % block_size:
            raise ValueError(
                f"block_size={block_size} must divide the {x.shape[1]} tokens of x; pad or cut x"
            )
        p = self.self_attn.project(x, rope)
        out, _ = self.delta.attend_clip(p, x.shape[1] // block_size, copies=1)
        return self.self_attn.output(out)
