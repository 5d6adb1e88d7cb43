"""Self-attention as projections, and cross-attention to text."""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from arl2_jax.config import AttentionConfig
from arl2_jax.memory import Projections
from arl2_jax.nn.attention import attention
from arl2_jax.nn.linear import dot_general
from arl2_jax.nn.norm import RMSNorm
from arl2_jax.parameters import ParameterFacts, declare

declare(
    {
        "(self_attn|cross_attn)/[qkv]/kernel": ParameterFacts(("fsdp", "tensor"), matrix=True),
        "(self_attn|cross_attn)/o/kernel": ParameterFacts(("tensor", "fsdp"), matrix=True),
        "(self_attn|cross_attn)/[qkvo]/bias": ParameterFacts((None,), decay=False),
        "(self_attn|cross_attn)/norm_[qk]/scale": ParameterFacts(
            (None,), decay=False, keep_float32=True
        ),
    }
)


class AttentionProjections(nnx.Module):
    """The four linear layers of attention, with RMSNorm on q and k over the full width."""

    def __init__(self, cfg: AttentionConfig, *, rngs: nnx.Rngs):
        width = cfg.num_heads * cfg.head_dim
        make = lambda i, o: nnx.Linear(
            i,
            o,
            kernel_init=nnx.initializers.xavier_uniform(),
            dtype=jnp.dtype(cfg.dtype),
            dot_general=dot_general,
            rngs=rngs,
        )
        self.q, self.k, self.v = (make(cfg.dim, width) for _ in range(3))
        self.o = make(width, cfg.dim)
        self.norm_q, self.norm_k = (RMSNorm(width, cfg.eps, rngs=rngs) for _ in range(2))
        self.num_heads = cfg.num_heads

    def heads(self, x: Float[Array, "b n c"]) -> Float[Array, "b n h d"]:
        """Split the width into heads."""
        return rearrange(x, "b n (h d) -> b n h d", h=self.num_heads)


class SelfAttention(AttentionProjections):
    """Projections of self-attention; the memory computes the attention between them."""

    def project(self, x: Float[Array, "b n c"]) -> Projections:
        """Project normalised, modulated tokens."""
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
        )

    def output(self, heads: Float[Array, "b n h d"]) -> Float[Array, "b n c"]:
        """Join the heads and apply Wo."""
        return self.o(heads.reshape(*heads.shape[:2], -1))


class TextContext(NamedTuple):
    """Keys and values of the text for one layer, or stacked for many, [..., B, L, H, D]."""

    k: Float[Array, "*layers texts l h d"]
    v: Float[Array, "*layers texts l h d"]


class CrossAttention(AttentionProjections):
    """Attention to the text; all slots are attended, padding included, as in Wan."""

    def encode(self, text: Float[Array, "b l c"]) -> TextContext:
        """Return keys and values of embedded text, which depend on the prompt alone."""
        return TextContext(self.heads(self.norm_k(self.k(text))), self.heads(self.v(text)))

    def __call__(self, x: Float[Array, "b n c"], text: TextContext) -> Float[Array, "b n c"]:
        """Attend from every token to all text slots."""
        # Copies of a clip are adjacent in the batch and share its text.
        k, v = (jnp.repeat(t, len(x) // len(t), axis=0) for t in text)
        out = attention(self.heads(self.norm_q(self.q(x))), k, v)
        return self.o(out.reshape(*x.shape[:2], -1))
