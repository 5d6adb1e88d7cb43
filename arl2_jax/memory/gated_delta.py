"""ARL2's memory: softmax inside the block, a gated delta state of fixed size across blocks."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from arl2_jax.config import ModelConfig
from arl2_jax.memory.interface import Projections
from arl2_jax.nn.attention import attention
from arl2_jax.nn.lora import LowRank
from arl2_jax.nn.norm import rms_norm
from arl2_jax.nn.rope import rotate
from arl2_jax.sharding import BLOCKS, CLIPS, HEADS, per_device
from pallas_kernels import dot_product_attention, gated_delta_states
from pallas_kernels.gated_delta import context_parallel

State = Float[Array, "b h k v"]
# Tokens by block, [B, blocks, n, H, ...]: a block is whole on its device, which needs no other.
_BY_BLOCK = PartitionSpec(CLIPS, BLOCKS, None, HEADS)


class GatedDelta(nnx.Module):
    """Attends locally, remembers linearly.

    With S the state as the last clean block left it, q', k', v' the layer's projections plus
    their low-rank updates, and qm, km, vm the projections per head P of those, rotated and of
    unit length (vm: neither):

        out = softmax(q k^T / sqrt(D)) v + sigmoid(x Wg) (qm S) / sqrt(D)

    and once per clean block, token by token,

        S <- exp(g) S;  S <- S + beta km (vm - S^T km)^T
        g = -exp(A_log) softplus(x Wa + dt_bias),  beta = 2 sigmoid(x Wb)

    Source: ARL2, arXiv 2605.16579; the rule itself: arXiv 2412.06464.
    """

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        dim, heads, dtype = cfg.dim, cfg.num_heads, jnp.dtype(cfg.dtype)
        self.heads, self.head_dim, self.eps, self.dtype = heads, cfg.head_dim, cfg.eps, dtype
        self.closed = cfg.memory_gate != "learned"
        self.local = cfg.memory_gate == "local"
        # Xavier-uniform with gain 2^-2.5, whose square is the scale of the variance.
        gentle = nnx.initializers.variance_scaling(2.0**-5, "fan_avg", "uniform")
        make = lambda: nnx.Linear(
            dim, heads, use_bias=False, kernel_init=gentle, dtype=jnp.float32, rngs=rngs
        )
        self.a_proj, self.b_proj, self.gate_proj = make(), make(), make()
        rates = jax.random.uniform(rngs.params(), (heads,), minval=1e-4, maxval=16.0)
        self.A_log = nnx.Param(jnp.log(rates))
        self.dt_bias = nnx.Param(_dt_bias(rngs.params(), heads))
        identity = jnp.tile(jnp.eye(cfg.head_dim), (heads, 1, 1))
        self.phi_q, self.phi_k, self.phi_v = (nnx.Param(identity) for _ in range(3))
        lora = lambda: LowRank(dim, dim, cfg.lora_rank, cfg.lora_alpha, dtype, rngs=rngs)
        self.lora_q, self.lora_k, self.lora_v = lora(), lora(), lora()

    def init_state(self, batch: int, capacity: int = 0) -> State:
        """The empty state [B, H, D, D] float32; its size does not depend on the capacity."""
        del capacity
        return jnp.zeros((batch, self.heads, self.head_dim, self.head_dim), jnp.float32)

    def attend(self, p: Projections, state: State, position=0):
        """The block's own softmax plus what it reads from the state."""
        del position  # positions are in the rotation
        local = attention(*self._local_heads(p))
        if self.closed:
            return local
        read, gate = self._read(p, state[:, None], copies=1)
        return local + (gate * read).astype(local.dtype)

    def write(self, p: Projections, state: State, position=0) -> State:
        """The state after the block."""
        del position
        return state if self.closed else self._states(p, state, 1, np.s_[1:])[:, 0]

    def attend_clip(self, p: Projections, blocks, copies):
        """All blocks at once: clean copies make the states, all copies read them."""
        split = lambda x: x.reshape(len(x), blocks, x.shape[1] // blocks, *x.shape[2:])
        q, k, v = map(split, self._local_heads(p))
        local = per_device(_attend_inside, (_BY_BLOCK,) * 3, _BY_BLOCK)(q, k, v).reshape(p.v.shape)
        if self.closed:
            return local, {}
        clean = p.first_of(copies)
        states = self._states(clean, self.init_state(len(clean.x)), blocks, np.s_[:-1])
        read, gate = self._read(p, states, copies)
        return local + (gate * read).astype(local.dtype), _diagnostics(local, read, gate)

    def _local_heads(self, p: Projections) -> tuple[Array, Array, Array]:
        """Queries, keys and values of the softmax inside the block, [B, n, H, D]."""
        if not self.local:
            return rotate(p.q, p.rope), rotate(p.k, p.rope), p.v
        q = rms_norm(p.q_raw + self.lora_q(p.x), p.q_scale, self.eps)
        k = rms_norm(p.k_raw + self.lora_k(p.x), p.k_scale, self.eps)
        v = p.v.reshape(p.x.shape) + self.lora_v(p.x)
        q, k = self._heads(q, self.phi_q), self._heads(k, self.phi_k)
        return rotate(q, p.rope), rotate(k, p.rope), self._heads(v, self.phi_v)

    def _read(self, p: Projections, states: Float[Array, "b m h k v"], copies: int):
        """What each token reads of its block's state (float32), and its gate [B, n, H, 1]."""
        q = rms_norm(p.q_raw + self.lora_q(p.x), p.q_scale, self.eps)
        q = _unit(rotate(self._heads(q, self.phi_q), p.rope))
        q = rearrange(q, "(b s) (m n) h k -> b s m n h k", s=copies, m=states.shape[1])
        # The state comes first: XLA for CPUs cannot run the other order in bfloat16.
        read = jnp.einsum(
            "bmhkv,bsmnhk->bsmnhv", states.astype(q.dtype), q, preferred_element_type=jnp.float32
        )
        read = read.reshape(p.v.shape) * self.head_dim**-0.5
        return read, jax.nn.sigmoid(self.gate_proj(p.x))[..., None]

    def _states(self, p: Projections, state: State, blocks: int, kept: slice):
        """Those kept of the states before each block and after the last, as many as blocks.

        [B, blocks, H, D, D] float32.
        """
        k = rms_norm(p.k_raw + self.lora_k(p.x), p.k_scale, self.eps)
        k = _unit(rotate(self._heads(k, self.phi_k), p.rope))
        v = self._heads(p.v.reshape(p.x.shape) + self.lora_v(p.x), self.phi_v)
        g = -jnp.exp(self.A_log[...]) * jax.nn.softplus(self.a_proj(p.x) + self.dt_bias[...])
        beta = 2 * jax.nn.sigmoid(self.b_proj(p.x))
        split = lambda x: x.reshape(len(x), blocks, x.shape[1] // blocks, *x.shape[2:])

        def states(k, v, g, beta, state):
            own, size = k.shape[1:3]
            k, v, g, beta = (x.reshape(len(x), -1, *x.shape[3:]) for x in (k, v, g, beta))
            if own == blocks:
                return gated_delta_states(k, v, g, beta, state, block_size=size)[:, kept]
            # A device has some of the blocks; nothing moves but two matrices a head.
            return context_parallel.gated_delta_states(
                k, v, g, beta, state, axis_name=BLOCKS, block_size=size
            )[:, kept]

        inputs = (*(_BY_BLOCK,) * 4, PartitionSpec(CLIPS, HEADS))
        output = PartitionSpec(CLIPS, BLOCKS, HEADS)
        return per_device(states, inputs, output)(*map(split, (k, v, g, beta)), state)

    def _heads(self, x: Float[Array, "b n c"], phi: nnx.Param) -> Float[Array, "b n h d"]:
        """Splits the heads and applies each head's own D x D projection."""
        heads = rearrange(x, "b n (h d) -> b n h d", h=self.heads).astype(self.dtype)
        return jnp.einsum("bnhd,hde->bnhe", heads, phi[...].astype(self.dtype))


def _attend_inside(q: Array, k: Array, v: Array) -> Array:
    """Attention of every block to itself, [B, blocks, n, H, D]."""
    fold = lambda x: x.reshape(-1, *x.shape[2:])
    return dot_product_attention(fold(q), fold(k), fold(v)).reshape(q.shape)


def _unit(x: Array) -> Array:
    """Rows of unit length; the small constant keeps zero rows at zero."""
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _dt_bias(key: Array, heads: int) -> Array:
    """Inverse softplus of step sizes, log-uniform in [1e-3, 1e-1]."""
    low, high = jnp.log(1e-3), jnp.log(1e-1)
    dt = jnp.exp(jax.random.uniform(key, (heads,), minval=low, maxval=high))
    return dt + jnp.log(-jnp.expm1(-dt))


def _diagnostics(local: Array, read: Array, gate: Array) -> dict[str, Array]:
    """The published measures of how much a layer uses its memory."""
    rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))
    local_rms = rms(local)
    return {
        "local_rms": local_rms,
        "memory_rms": rms(read),
        "gated_memory_to_local": rms(gate * read) / (local_rms + 1e-12),
        "gate_mean": jnp.mean(gate),
        "gate_below_0.05": jnp.mean(gate < 0.05),
        "gate_above_0.95": jnp.mean(gate > 0.95),
    }
