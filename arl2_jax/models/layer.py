"""One transformer layer, the same for a block and for a whole clip."""

from typing import NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from arl2_jax.config import ModelConfig
from arl2_jax.memory import MEMORIES, GatedDelta
from arl2_jax.models.attention import CrossAttention, SelfAttention, TextContext
from arl2_jax.models.embeddings import modulate
from arl2_jax.nn.lora import LowRank
from arl2_jax.nn.mlp import MLP, gelu_tanh
from arl2_jax.nn.norm import layer_norm
from arl2_jax.nn.rope import Rope


class Conditions(NamedTuple):
    """What a layer needs besides its tokens; equal for all layers but for the text.

    Attributes:
      modulation: projected timestep, [B, F, 6, C] float32.
      rope: rotary positions.
    """

    modulation: Float[Array, "b f six c"]
    rope: Rope


class Delta(GatedDelta):
    """Everything that ARL2 adds to a layer: the memory and low-rank updates of the FFN."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(cfg, rngs=rngs)
        lora = lambda i, o: LowRank(
            i,
            o,
            cfg.lora_rank,
            cfg.lora_alpha,
            jnp.dtype(cfg.dtype),
            init=cfg.lora_init,
            rngs=rngs,
        )
        self.lora_fc1 = lora(cfg.dim, cfg.ffn_dim)
        self.lora_fc2 = lora(cfg.ffn_dim, cfg.dim)


class TransformerLayer(nnx.Module):
    """Self-attention with a memory, cross-attention to text, and a feed-forward network.

    The attention is split from the rest, so that training can look at it alone:
    `attention_input`, then attention, then `finish`.
    """

    def __init__(self, cfg: ModelConfig, memory: str, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        self.norm1 = layer_norm(cfg.dim, cfg.eps, affine=False, rngs=rngs)
        self.self_attn = SelfAttention(cfg, rngs=rngs)
        self.norm3 = layer_norm(cfg.dim, cfg.eps, affine=True, rngs=rngs)
        self.cross_attn = CrossAttention(cfg, rngs=rngs)
        self.norm2 = layer_norm(cfg.dim, cfg.eps, affine=False, rngs=rngs)
        self.ffn = MLP(cfg.dim, cfg.ffn_dim, cfg.dim, gelu_tanh, dtype, rngs=rngs)
        spread = nnx.initializers.normal(cfg.dim**-0.5)
        self.modulation = nnx.Param(spread(rngs.params(), (6, cfg.dim)))
        self.hybrid = memory == "gated_delta"
        self.dtype = dtype
        if self.hybrid:
            self.delta = Delta(cfg, rngs=rngs)
        else:
            self.memory = MEMORIES[memory](cfg, rngs=rngs)

    def attention_input(self, x, conditions: Conditions):
        """Normalised and modulated tokens, [B, n, C]."""
        shift, scale = self._modulation(conditions)[:2]
        return modulate(self.norm1(x), shift, scale).astype(self.dtype)

    def finish(self, x, attended, conditions: Conditions, text: TextContext):
        """Adds the attention's output, then cross-attention and the FFN."""
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = self._modulation(conditions)
        x = x + _gated(attended, gate)
        x = x + self.cross_attn(self.norm3(x).astype(self.dtype), text)
        h = modulate(self.norm2(x), ffn_shift, ffn_scale).astype(self.dtype)
        loras = (self.delta.lora_fc1, self.delta.lora_fc2) if self.hybrid else (None, None)
        return x + _gated(self.ffn(h, *loras), ffn_gate)

    def attend_clip(self, h, conditions: Conditions, blocks: int, copies: int):
        """Self-attention of a whole clip: (output after Wo, diagnostics)."""
        p = self.self_attn.project(h, conditions.rope)
        out, diagnostics = self.own_memory.attend_clip(p, blocks, copies)
        return self.self_attn.output(out), diagnostics

    def clip(self, x, conditions: Conditions, text: TextContext, blocks: int, copies: int):
        """The layer on a whole clip: (tokens, diagnostics)."""
        h = self.attention_input(x, conditions)
        attended, diagnostics = self.attend_clip(h, conditions, blocks, copies)
        return self.finish(x, attended, conditions, text), diagnostics

    def block(
        self,
        x,
        conditions: Conditions,
        text: TextContext,
        state,
        position,
        *,
        write: bool,
        read=None,
    ):
        """The layer on one block: (tokens, state); the state is new only if `write`.

        `read` is the state to attend to, by default `state`, which is the one written to.
        """
        h = self.attention_input(x, conditions)
        p = self.self_attn.project(h, conditions.rope)
        seen = state if read is None else read
        attended = self.self_attn.output(self.own_memory.attend(p, seen, position))
        if write:
            state = self.own_memory.write(p, state, position)
        return self.finish(x, attended, conditions, text), state

    @property
    def own_memory(self):
        """The memory, wherever its parameters live."""
        return self.delta if self.hybrid else self.memory

    def _modulation(self, conditions: Conditions):
        """Six [B, F, C] float32 terms: shift, scale, gate of attention, then of the FFN."""
        return jnp.moveaxis(self.modulation[...] + conditions.modulation, 2, 0)


def _gated(y, gate: Float[Array, "b f c"]):
    """y times one gate per frame, in the dtype of y."""
    frames = rearrange(y, "b (f n) c -> b f n c", f=gate.shape[1])
    return (frames * gate[:, :, None]).reshape(y.shape).astype(y.dtype)
