"""One transformer layer, the same for a block and for a whole clip."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from arl2_jax.config import MemorySpec, ModelConfig
from arl2_jax.memory import make_memory
from arl2_jax.models.attention import CrossAttention, SelfAttention, TextContext
from arl2_jax.models.embeddings import modulate
from arl2_jax.nn.lora import LowRank
from arl2_jax.nn.mlp import MLP, gelu_tanh
from arl2_jax.nn.norm import layer_norm
from arl2_jax.nn.positions import TokenGrid
from arl2_jax.parameters import ParameterFacts, declare

declare(
    {
        "ffn/fc1/kernel": ParameterFacts(("fsdp", "tensor"), matrix=True),
        "ffn/fc2/kernel": ParameterFacts(("tensor", "fsdp"), matrix=True),
        "ffn/fc[12]/bias": ParameterFacts((None,), decay=False),
        "norm3/scale": ParameterFacts((None,), decay=False, keep_float32=True),
        "norm3/bias": ParameterFacts((None,), decay=False),
        # Of a layer, and of the head.
        "modulation": ParameterFacts((None, None), decay=False, keep_float32=True),
        "delta/lora_fc[12]/a": ParameterFacts(("fsdp", None), matrix=True, low_rank=True),
        "delta/lora_fc[12]/b": ParameterFacts((None, "fsdp"), matrix=True, low_rank=True),
    }
)

Params = dict[str, Any]


class Conditions(NamedTuple):
    """Inputs of a layer other than its tokens and text; equal for all layers.

    Attributes:
      modulation: projected timestep, [B, T, 6, C] float32.
      grid: positions of the tokens.
    """

    modulation: Float[Array, "b t 6 c"]
    grid: TokenGrid


class FFNUpdates(nnx.Module):
    """Low-rank updates of the two matrices of a converted layer's feed-forward network."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        make = lambda i, o: LowRank(
            i, o, cfg.lora_rank, cfg.lora_alpha, dtype, init=cfg.lora_init, rngs=rngs
        )
        self.fc1, self.fc2 = make(cfg.dim, cfg.ffn_dim), make(cfg.ffn_dim, cfg.dim)


class TransformerLayer(nnx.Module):
    """Self-attention with a memory, cross-attention to text, and a feed-forward network.

    The attention is separate from the rest, so that training can use it alone: `attention_input`,
    then attention, then `finish`.
    """

    def __init__(self, cfg: ModelConfig, spec: MemorySpec, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        self.norm1 = layer_norm(cfg.dim, cfg.eps, affine=False, rngs=rngs)
        self.self_attn = SelfAttention(cfg.attention, rngs=rngs)
        self.norm3 = layer_norm(cfg.dim, cfg.eps, affine=True, rngs=rngs)
        self.cross_attn = CrossAttention(cfg.attention, rngs=rngs)
        self.norm2 = layer_norm(cfg.dim, cfg.eps, affine=False, rngs=rngs)
        self.ffn = MLP(cfg.dim, cfg.ffn_dim, cfg.dim, gelu_tanh, dtype, rngs=rngs)
        normal_init = nnx.initializers.normal(cfg.dim**-0.5)
        self.modulation = nnx.Param(normal_init(rngs.params(), (6, cfg.dim)))
        self.dtype = dtype
        self.memory, self.ffn_updates = additions(cfg, spec, rngs=rngs)

    def attention_input(self, x, conditions: Conditions):
        """Return normalised and modulated tokens, [B, n, C]."""
        shift, scale = self._modulation(conditions)[:2]
        return modulate(self.norm1(x), shift, scale).astype(self.dtype)

    def finish(self, x, attended, conditions: Conditions, text: TextContext):
        """Add the attention's output, then apply cross-attention and the FFN."""
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = self._modulation(conditions)
        x = x + _gated(attended, gate)
        x = x + self.cross_attn(self.norm3(x).astype(self.dtype), text)
        h = modulate(self.norm2(x), ffn_shift, ffn_scale).astype(self.dtype)
        updates = self.ffn_updates
        low_rank = () if updates is None else (updates.fc1, updates.fc2)
        return x + _gated(self.ffn(h, *low_rank), ffn_gate)

    def attend_clip(self, h, conditions: Conditions, blocks: int, copies: int):
        """Apply self-attention to a whole clip: (output after Wo, diagnostics)."""
        p = self.self_attn.project(h)
        out, diagnostics = self.memory.attend_clip(p, conditions.grid, blocks, copies)
        return self.self_attn.output(out), diagnostics

    def clip(self, x, conditions: Conditions, text: TextContext, blocks: int, copies: int):
        """Apply the layer to a whole clip: (tokens, diagnostics)."""
        h = self.attention_input(x, conditions)
        attended, diagnostics = self.attend_clip(h, conditions, blocks, copies)
        return self.finish(x, attended, conditions, text), diagnostics

    def block(
        self,
        x,
        conditions: Conditions,
        text: TextContext,
        state,
        aux=None,
        *,
        write: bool,
        read=None,
        layer=None,
    ):
        """Apply the layer to one block: (tokens, state, aux).

        Args:
          x: tokens [B, n, C].
          conditions, text: of the block.
          state: of the memory. It is new only if `write`; with `layer`, the stacked state is then
            replaced by the layer's entries.
          aux: sum of the memory's aux over earlier passes of this block.
          write: whether the block is finished and to be remembered.
          read: state to attend to, by default `state`, which is the one written to.
          layer: index in the stacked states of a run; None for the state of one layer.
        """
        h = self.attention_input(x, conditions)
        p = self.self_attn.project(h)
        grid = dataclasses.replace(conditions.grid, text=text.k, layer=layer)
        attended, gathered = self.memory.attend(p, state if read is None else read, grid)
        aux = gathered if aux is None else jax.tree.map(jnp.add, aux, gathered)
        if write and layer is not None:
            state = self.memory.entries(p, grid)
        elif write:
            state = self.memory.write(p, aux, state, grid)
        return self.finish(x, self.self_attn.output(attended), conditions, text), state, aux

    def _modulation(self, conditions: Conditions):
        """Return six [B, T, C] float32 terms: shift, scale, gate of attention, then of the FFN."""
        return jnp.moveaxis(self.modulation[...] + conditions.modulation, 2, 0)


def _gated(y, gate: Float[Array, "b t c"]):
    """Multiply y by one gate per frame, in the dtype of y."""
    frames = rearrange(y, "b (f n) c -> b f n c", f=gate.shape[1])
    return (frames * gate[:, :, None]).reshape(y.shape).astype(y.dtype)


def additions(cfg: ModelConfig, spec: MemorySpec, *, rngs: nnx.Rngs):
    """Make a layer's additions to the pretrained network: its memory, and updates of the FFN."""
    memory = make_memory(spec, cfg.attention, rngs=rngs)
    updated = spec.settings.converts and cfg.lora_rank > 0
    return memory, FFNUpdates(cfg, rngs=rngs) if updated else None


# Parameters of the additions lie under one node of a layer's public tree.
ADDED = "delta"
_FFN = {"fc1": "lora_fc1", "fc2": "lora_fc2"}


def is_added(path: str) -> bool:
    """Tell whether a parameter of the public tree is one that conversion adds."""
    return ADDED in path.split("/")


def is_ffn_update(path: str) -> bool:
    """Tell whether a parameter of the public tree belongs to a low-rank update of an FFN."""
    return is_added(path) and not {*path.split("/")}.isdisjoint(_FFN.values())


def to_public(layer: Params) -> Params:
    """Rename the parameters of a layer's modules as in the public tree."""
    layer = dict(layer)
    updates = layer.pop("ffn_updates", {})
    added = layer.pop("memory", {}) | {_FFN[name]: node for name, node in updates.items()}
    return layer | ({ADDED: added} if added else {})


def from_public(layer: Params) -> Params:
    """Rename a layer's part of the public tree as in its modules; undoes `to_public`."""
    if ADDED not in layer:
        return layer
    added = dict(layer[ADDED])
    updates = {name: added.pop(public) for name, public in _FFN.items() if public in added}
    base = {name: node for name, node in layer.items() if name != ADDED}
    return (
        base | ({"memory": added} if added else {}) | ({"ffn_updates": updates} if updates else {})
    )
