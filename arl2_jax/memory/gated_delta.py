"""ARL2's memory: softmax inside the block, a gated delta state of fixed size across blocks."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from arl2_jax.config import AttentionConfig, GatedDeltaConfig
from arl2_jax.memory import initial
from arl2_jax.memory.interface import Projections, Room
from arl2_jax.memory.recurrence import (
    BY_BLOCK,
    Writes,
    running_reads,
    state_after,
    states_before,
)
from arl2_jax.memory.retention import measure_memory
from arl2_jax.nn.attention import attention
from arl2_jax.nn.linear import heads_matmul, thin_dot_general
from arl2_jax.nn.lora import LowRank, add_update
from arl2_jax.nn.norm import rms_norm
from arl2_jax.nn.positions import TokenGrid
from arl2_jax.nn.rope import rotate
from arl2_jax.parameters import ParameterFacts, declare
from arl2_jax.sharding import per_device
from pallas_kernels import dot_product_attention

declare(
    {
        "delta/phi_[qkv]": ParameterFacts(("tensor", None, None), matrix=True),
        "delta/(a|b|gate)_proj/kernel": ParameterFacts(("fsdp", None), keep_float32=True),
        "delta/lora_[qkv]/a": ParameterFacts(("fsdp", None), matrix=True, low_rank=True),
        "delta/lora_[qkv]/b": ParameterFacts((None, "fsdp"), matrix=True, low_rank=True),
        "delta/(A_log|dt_bias|beta_bias)": ParameterFacts((None,), decay=False, keep_float32=True),
    }
)

State = Float[Array, "b h k v"]


class GatedDelta(nnx.Module):
    """Softmax attention inside a block, and linear memory across blocks.

    With S the state after the last clean block, q', k', v' the layer's projections plus their
    low-rank updates (none if lora_rank is 0), and qm, km, vm the projections per head P of those,
    rotated and of unit length (vm: neither):

        out = softmax(q k^T / sqrt(D)) v + sigmoid(x Wg) (qm S) / sqrt(D)

    and once per clean block, token by token,

        S <- exp(g) S;  S <- S + beta km (vm - S^T km)^T
        g = -exp(A_log) softplus(x Wa + dt_bias),  beta = 2 sigmoid(x Wb)

    A leak (`settings.leak`) is spread over the tokens of a block and added to g.

    Source: ARL2, arXiv 2605.16579; the rule itself: arXiv 2412.06464.
    """

    bounded = True
    stacked = False
    gathers = False

    def __init__(self, settings: GatedDeltaConfig, cfg: AttentionConfig, *, rngs: nnx.Rngs):
        dim, heads, dtype = cfg.dim, cfg.num_heads, jnp.dtype(cfg.dtype)
        self.heads, self.head_dim, self.eps, self.dtype = heads, cfg.head_dim, cfg.eps, dtype
        self.gate, self.settings = cfg.memory_gate, settings
        # Xavier-uniform with gain 2^-2.5, whose square is the scale of the variance.
        small_init = nnx.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")
        make = lambda: nnx.Linear(
            dim,
            heads,
            use_bias=False,
            kernel_init=small_init,
            dtype=jnp.float32,
            dot_general=thin_dot_general,
            rngs=rngs,
        )
        self.a_proj, self.b_proj, self.gate_proj = make(), make(), make()
        start = initial.values(settings, cfg, rngs.params(), rngs.params())
        self.A_log, self.dt_bias = nnx.Param(start.A_log), nnx.Param(start.dt_bias)
        if start.beta_bias is not None:
            self.beta_bias = nnx.Param(start.beta_bias)
        identity = jnp.tile(jnp.eye(cfg.head_dim), (heads, 1, 1))
        self.phi_q, self.phi_k = nnx.Param(identity), nnx.Param(identity)
        self.value_scale = initial.value_scale(settings, cfg)
        self.phi_v = nnx.Param(self.value_scale * identity)
        width = heads * cfg.head_dim
        make = lambda: LowRank(
            dim, width, cfg.lora_rank, cfg.lora_alpha, dtype, init=cfg.lora_init, rngs=rngs
        )
        loras = [make() for _ in "qkv"] if cfg.lora_rank else [None] * 3
        self.lora_q, self.lora_k, self.lora_v = loras

    def init_state(self, batch: int, room: Room | None = None) -> State:
        """Return the empty state [B, H, D, D] float32; its size does not depend on the room."""
        del room
        return jnp.zeros((batch, self.heads, self.head_dim, self.head_dim), jnp.float32)

    def attend(self, p: Projections, state: State, grid: TokenGrid):
        """Return the block's own softmax attention plus its read of the state; no aux."""
        local = attention(*self._local(p, grid))
        if self.gate != "learned":
            return local, None
        read, gate = self._read(p, grid, state[:, None], copies=1)
        return local + (gate * read).astype(local.dtype), None

    def write(self, p: Projections, aux: None, state: State, grid: TokenGrid) -> State:
        """Return the state after the block."""
        del aux
        if self.gate != "learned":
            return state
        return state_after(self.settings, self.writes(p, grid, 1), state)

    def attend_clip(self, p: Projections, grid: TokenGrid, blocks: int, copies: int):
        """Attend in all blocks at once: clean copies write the states, all copies read them."""
        split = lambda x: x.reshape(len(x), blocks, x.shape[1] // blocks, *x.shape[2:])
        q, k, v = map(split, self._local(p, grid))
        local = per_device(_attend_inside, (BY_BLOCK,) * 3, BY_BLOCK)(q, k, v).reshape(p.v.shape)
        if self.gate != "learned":
            return local, {}
        clean = p.first_of(copies)
        writes, empty = self.writes(clean, grid, blocks), self.init_state(len(clean.x))
        states = states_before(self.settings, writes, empty, blocks)
        read, gate = self._read(p, grid, states, copies)
        logged = _diagnostics(local, read, gate, writes, blocks)
        return local + (gate * read).astype(local.dtype), logged

    def read_clip(self, p: Projections, grid: TokenGrid, blocks: int, copies: int):
        """Return every token's read of the past, [B, n, H, D] float32, and its gate.

        The gate is [B, n, H, 1]; arguments as in `attend_clip`.
        """
        clean = p.first_of(copies)
        state = self.init_state(len(clean.x))
        states = states_before(self.settings, self.writes(clean, grid, blocks), state, blocks)
        return self._read(p, grid, states, copies)

    def measure(self, p: Projections, grid: TokenGrid, blocks: int) -> dict[str, Array]:
        """Measure how much of the past the memory keeps; see `retention.measure_memory`."""
        return measure_memory(self, p, grid, blocks)

    def writes(self, p: Projections, grid: TokenGrid, blocks: int) -> Writes:
        """Compute keys, values, log decays and strengths of the tokens of some blocks."""
        _, k, v = self._memory_heads(p)
        if self.settings.decay == "none":
            g = jnp.zeros((*p.x.shape[:2], self.heads), jnp.float32)
        else:
            g = -jnp.exp(self.A_log[...]) * jax.nn.softplus(self.a_proj(p.x) + self.dt_bias[...])
        if self.settings.leak:
            g = g + math.log1p(-self.settings.leak) * blocks / p.x.shape[1]
        strength = self.b_proj(p.x)
        if hasattr(self, "beta_bias"):
            strength = strength + self.beta_bias[...]
        beta = self.settings.beta_max * jax.nn.sigmoid(strength)
        return Writes(_unit(rotate(k, grid.rotation())), v, g, beta)

    def _read(
        self,
        p: Projections,
        grid: TokenGrid,
        states: Float[Array, "clips blocks h k v"],
        copies: int,
    ):
        """Return each token's read of its block's state (float32), and its gate [B, n, H, 1]."""
        q = _unit(rotate(self._memory_heads(p)[0], grid.rotation()))
        if self.settings.read == "token":
            read = self._read_running(p, grid, q, states, copies)
        else:
            q = rearrange(q, "(b s) (m n) h k -> b s m n h k", s=copies, m=states.shape[1])
            # The state comes first: XLA for CPUs cannot run the other order in bfloat16.
            read = jnp.einsum(
                "bmhkv,bsmnhk->bsmnhv",
                states.astype(q.dtype),
                q,
                preferred_element_type=jnp.float32,
            )
        read = read.reshape(p.v.shape) * self.head_dim**-0.5
        return read, jax.nn.sigmoid(self.gate_proj(p.x))[..., None]

    def _read_running(
        self,
        p: Projections,
        grid: TokenGrid,
        q,
        states: Float[Array, "clips blocks h k v"],
        copies: int,
    ):
        """Read the running state: every copy of a block continues from the block's state."""
        fold = lambda x: x.reshape(-1, x.shape[1] // states.shape[1], *x.shape[2:])
        before = jnp.repeat(states, copies, axis=0).reshape(-1, *states.shape[2:])
        writes = Writes(*map(fold, self.writes(p, grid, states.shape[1])))
        return running_reads(self.settings, fold(q), writes, before)

    def _local(self, p: Projections, grid: TokenGrid):
        """Return rotated queries and keys, and values, of the softmax inside the block."""
        rope = grid.rotation()
        if self.gate != "local":
            return rotate(p.q, rope), rotate(p.k, rope), p.v
        q, k, v = self._memory_heads(p)
        # P_v may start as c I; divide by c, so that the control starts from the softmax values.
        return rotate(q, rope), rotate(k, rope), v / self.value_scale

    def _memory_heads(self, p: Projections):
        """Return the memory's q, k and v, [B, n, H, D], neither rotated nor scaled."""
        q = rms_norm(add_update(p.q_raw, self.lora_q, p.x), p.q_scale, self.eps)
        k = rms_norm(add_update(p.k_raw, self.lora_k, p.x), p.k_scale, self.eps)
        v = add_update(p.v.reshape(p.q_raw.shape), self.lora_v, p.x)
        return (
            self._heads(q, self.phi_q),
            self._heads(k, self.phi_k),
            self._heads(v, self.phi_v),
        )

    def _heads(self, x: Float[Array, "b n c"], phi: nnx.Param) -> Float[Array, "b n h d"]:
        """Split the heads and apply each head's own D x D projection."""
        heads = rearrange(x, "b n (h d) -> b n h d", h=self.heads).astype(self.dtype)
        return heads_matmul(heads, phi[...].astype(self.dtype))


def _attend_inside(q: Array, k: Array, v: Array) -> Array:
    """Attend from every block to itself, [B, blocks, n, H, D]."""
    fold = lambda x: x.reshape(-1, *x.shape[2:])
    return dot_product_attention(fold(q), fold(k), fold(v)).reshape(q.shape)


def _unit(x: Array) -> Array:
    """Scale rows to unit length; the small constant keeps zero rows at zero."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _diagnostics(
    local: Array, read: Array, gate: Array, writes: Writes, blocks: int
) -> dict[str, Array]:
    """Compute the published measures of a layer's use of its memory, and measures of its writes.

    The latter are means over heads: the share that the decay alone leaves after a block,
    exp(sum g); the strength; and how often the writes of a block replace the whole state,
    n beta / D.
    """
    rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
    local_rms, beta = rms(local), jnp.mean(writes.beta)
    batch, time, heads, width = writes.k.shape
    g = writes.g.reshape(batch, blocks, time // blocks, heads)
    return {
        "local_rms": local_rms,
        "memory_rms": rms(read),
        "gated_memory_to_local": rms(gate * read) / (local_rms + 1e-12),
        "gate_mean": jnp.mean(gate),
        "gate_below_0.05": jnp.mean(gate < 0.05),
        "gate_above_0.95": jnp.mean(gate > 0.95),
        "block_decay": jnp.mean(jnp.exp(jnp.sum(g, axis=2))),
        "beta_mean": beta,
        "write_load": time // blocks / width * beta,
    }
