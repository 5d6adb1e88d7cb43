"""The gated delta rule by chunks, in plain XLA, with a hand-written backward pass.

For a chunk of C tokens with start state S, and T = (I + L)^-1 where L is the strictly lower part
of diag(beta) K K^T:

    gamma = exp(sum_i g_i)     r_i = exp(sum_{j>i} g_j)     Y = T^T K     X = diag(beta) Y
    A = gamma (I - X^T K)      B = X^T diag(r) V            S' = A S + B

The gates stay outside T, and every exponent is a sum of non-positive numbers. Maps (A, B) of all
chunks are formed at once and composed pairwise within a block; blocks are folded in order.
Inside this file arrays are [block, chunk, B, H, token, feature]: one transpose on the way in, then
every product is a batched matrix product. Functions that take one block see the axes after it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.gated_delta.plan import Plan

# Chunk maps formed at once, in elements (1 GiB of float32); larger inputs go block by block.
_MAP_ELEMENTS = 2**28


class Residuals(NamedTuple):
    """Inputs, and the start state and matrix A of each block, for the backward pass."""

    k: Array
    v: Array
    g: Array
    beta: Array
    starts: Array
    a: Array


class Factors(NamedTuple):
    """Factors computed from a chunk's keys and gates, named as in the equations above."""

    gamma: Array  # [..., 1, 1]
    r: Array  # [..., C, 1]
    gram: Array  # K K^T
    t: Array
    y: Array
    x: Array


def states(plan: Plan, *inputs: Array) -> Array:
    """Return states at the boundaries of blocks; inputs as for `forward`."""
    return forward(plan, *inputs)[0]


def forward(
    plan: Plan, k: Array, v: Array, g: Array, beta: Array, initial_state: Array
) -> tuple[Array, Residuals]:
    """Return states at the boundaries of blocks, and residuals for the backward pass."""
    inputs = tuple(_split(plan, x) for x in (k, v, g, beta))
    a, b = _over_blocks(partial(_block_map, plan), inputs)

    def step(state: Array, block: tuple[Array, Array]):
        return _states(plan, "...ij,...jk->...ik", block[0], state) + block[1], state

    last, starts = lax.scan(step, initial_state, (a, b))
    states = jnp.moveaxis(jnp.concatenate([starts, last[None]]), 0, 1)
    return states, Residuals(k, v, g, beta, starts, a)


def backward(plan: Plan, res: Residuals, dstates: Array) -> tuple[Array, ...]:
    """Return gradients of k, v, g, beta and initial_state."""
    dstates = jnp.moveaxis(dstates, 1, 0)

    def step(d: Array, block: tuple[Array, Array]):
        return _states(plan, "...ji,...jk->...ik", block[0], d) + block[1], d

    dinitial, ends = lax.scan(step, dstates[-1], (res.a, dstates[:-1]), reverse=True)
    inputs = tuple(_split(plan, x) for x in res[:4])
    grads = _over_blocks(partial(_block_backward, plan), (*inputs, res.starts, ends))
    dinputs = (_join(plan, d, x) for d, x in zip(grads, res[:4], strict=True))
    return (*dinputs, dinitial)


def unsupported_reason(plan: Plan, k: Array, v: Array) -> None:
    """Return None: this form takes all calls."""
    del plan, k, v


def _block_map(plan: Plan, k: Array, v: Array, g: Array, beta: Array) -> tuple[Array, Array]:
    """Return the map of one block."""
    a, b = _tree(plan, *_chunk_maps(plan, _factors(plan, k, g, beta), k, v))[-1]
    return a[0], b[0]


def _block_backward(
    plan: Plan, k: Array, v: Array, g: Array, beta: Array, start: Array, end: Array
) -> tuple[Array, Array, Array, Array]:
    """Return gradients of a block's inputs, from its start state and its end state's cotangent.

    With D the cotangent of a chunk's end state, Z = T diag(beta) dX and P = -lower(Y Z^T):

        R  = diag(r) V - gamma K S        dR = X D        dX = R D^T        dS = A^T D
        dV = diag(r) dR                   dK = Z - gamma dR S^T + (Q + Q^T) K,  Q = diag(beta) P
        dbeta = rowsum(dX * Y + P * K K^T)
        dg_t = <dS, S> + sum_{i<t} <v_i, dv_i>
    """
    f = _factors(plan, k, g, beta)
    a, b = _chunk_maps(plan, f, k, v)
    tree = _tree(plan, a, b)
    s, d = _starts(plan, tree, start), _ends(plan, tree, end)
    v = v.astype(plan.state)

    residual = f.r * v - f.gamma * _tokens(plan, "...ck,...kv->...cv", k, s)
    dresidual = _tokens(plan, "...ck,...kv->...cv", f.x, d)
    # Entries of dX and Z cancel where keys are similar, like those of Y.
    dx = _states(plan, "...cv,...kv->...ck", residual, d)
    z = _states(plan, "...ij,...jk->...ik", f.t, beta[..., None] * dx)
    p = -jnp.tril(_tokens(plan, "...ik,...jk->...ij", f.y, z), -1)
    q = beta[..., None] * p

    dv = f.r * dresidual
    dk = z - f.gamma * _tokens(plan, "...cv,...kv->...ck", dresidual, s)
    dk += _tokens(plan, "...ij,...jk->...ik", q + q.mT, k)
    dbeta = (dx * f.y).sum(-1) + (p * f.gram).sum(-1)
    ds = jnp.concatenate([_states(plan, "...ji,...jk->...ik", a[:1], d[:1]), d[:-1]])
    dg = (ds * s).sum((-2, -1))[..., None] + _sum_before((v * dv).sum(-1))
    return dk, dv, dg, dbeta


def _factors(plan: Plan, k: Array, g: Array, beta: Array) -> Factors:
    # Suffix sums, never differences of sums, in which a reset of -1e4 would absorb the rest.
    decay = lax.cumsum(g, axis=g.ndim - 1, reverse=True)
    gamma = jnp.exp(decay[..., :1])[..., None]
    r = jnp.exp(jnp.pad(decay[..., 1:], [(0, 0)] * (g.ndim - 1) + [(0, 1)]))[..., None]
    gram = _tokens(plan, "...ik,...jk->...ij", k, k)
    t = _inverse(plan, beta[..., None] * gram)
    # Where keys are similar, T^T K cancels: T stays float32 for any dtype of k.
    y = _states(plan, "...ji,...jk->...ik", t, k)
    return Factors(gamma, r, gram, t, y, beta[..., None] * y)


def _inverse(plan: Plan, m: Array) -> Array:
    """Return (I + L)^-1, L the strictly lower part of m, by block-wise forward substitution.

    Every intermediate is an inverse of a diagonal block or a substitution, bounded for any keys.
    Powers of L, as in Neumann doubling, lose all digits in float32 when keys are correlated.
    """
    size = m.shape[-1]
    block = 16 if size % 16 == 0 else 8
    tiles = [m[..., i : i + block, i : i + block] for i in range(0, size, block)]
    diagonal = _inverse_ladder(plan, jnp.stack(tiles, -3))
    t = diagonal[..., 0, :, :]
    for n, i in enumerate(range(block, size, block), 1):
        corner = diagonal[..., n, :, :]
        left = _states(plan, "...ij,...jk->...ik", m[..., i : i + block, :i], t)
        left = -_states(plan, "...ij,...jk->...ik", corner, left)
        t = jnp.pad(t, [(0, 0)] * (t.ndim - 1) + [(0, block)])
        t = jnp.concatenate([t, jnp.concatenate([left, corner], -1)], -2)
    return t


def _inverse_ladder(plan: Plan, m: Array) -> Array:
    """Invert as `_inverse`, for small powers of two: X <- X - X L_b X, L_b joins X's blocks."""
    size = m.shape[-1]
    i = jnp.arange(size)
    x = jnp.eye(size, dtype=m.dtype) - jnp.where((i[:, None] == i + 1) & (i % 2 == 0), m, 0)
    for b in (2**n for n in range(1, size.bit_length() - 1)):
        below = (i[:, None] // b == i // b + 1) & (i // b % 2 == 0)
        xl = _states(plan, "...ij,...jk->...ik", x, jnp.where(below, m, 0))
        x -= _states(plan, "...ij,...jk->...ik", xl, x)
    return x


def _chunk_maps(plan: Plan, f: Factors, k: Array, v: Array) -> tuple[Array, Array]:
    eye = jnp.eye(k.shape[-1], dtype=plan.state)
    # Long products of A keep what one of them loses where nothing decays.
    a = f.gamma * (eye - _states(plan, "...ci,...cj->...ij", f.x, k))
    return a, _tokens(plan, "...ck,...cv->...kv", f.x, f.r * v)


def _tree(plan: Plan, a: Array, b: Array) -> list[tuple[Array, Array]]:
    """Compose maps of chunks into those of pairs, pairs of pairs, ...; an odd last one is kept."""
    levels = [(a, b)]
    while (count := len(a)) > 1:
        low, high = slice(0, count - 1, 2), slice(1, None, 2)
        pair_a = _states(plan, "...ij,...jk->...ik", a[high], a[low])
        pair_b = _states(plan, "...ij,...jk->...ik", a[high], b[low]) + b[high]
        odd = slice(count - count % 2, None)
        a, b = jnp.concatenate([pair_a, a[odd]]), jnp.concatenate([pair_b, b[odd]])
        levels.append((a, b))
    return levels


def _starts(plan: Plan, tree: list[tuple[Array, Array]], start: Array) -> Array:
    """Return the state before each chunk, from the state before the first."""
    s = start[None]
    for a, b in reversed(tree[:-1]):
        low = slice(0, len(a) - 1, 2)
        s = _interleave(s, _states(plan, "...ij,...jk->...ik", a[low], s[: len(a) // 2]) + b[low])
    return s


def _ends(plan: Plan, tree: list[tuple[Array, Array]], end: Array) -> Array:
    """Return the cotangent of the state after each chunk, from the one after the last."""
    d = end[None]
    for a, _ in reversed(tree[:-1]):
        pairs = len(a) // 2
        low = _states(plan, "...ji,...jk->...ik", a[1::2], d[:pairs])
        d = _interleave(jnp.concatenate([low, d[pairs:]]), d[:pairs])
    return d


def _interleave(even: Array, odd: Array) -> Array:
    pairs = len(odd)
    both = jnp.stack([even[:pairs], odd], 1).reshape(2 * pairs, *odd.shape[1:])
    return jnp.concatenate([both, even[pairs:]])


def _sum_before(x: Array) -> Array:
    """Return exclusive prefix sums over the last axis."""
    return jnp.cumsum(jnp.pad(x[..., :-1], [(0, 0)] * (x.ndim - 1) + [(1, 0)]), -1)


def _over_blocks(f: Callable[..., Any], args: tuple[Array, ...]) -> Any:
    """Map f over blocks, as many at a time as the memory for chunk maps allows."""
    blocks, chunks, batch, heads, _, key_dim = args[0].shape
    each = chunks * batch * heads * key_dim * (key_dim + args[1].shape[-1])
    group = max(
        n for n in range(1, blocks + 1) if blocks % n == 0 and n * each <= max(each, _MAP_ELEMENTS)
    )
    if group == blocks:
        return jax.vmap(f)(*args)
    return lax.map(lambda block: f(*block), args, batch_size=group)


def _split(plan: Plan, x: Array) -> Array:
    """Split [B, T, H, ...] into [block, chunk, B, H, token, ...], each block padded with zeros.

    A padded token has beta = 0 and g = 0: the identity.
    """
    batch, time, heads, *features = x.shape
    chunk = _chunk_size(plan)
    x = x.reshape(batch, time // plan.block_size, plan.block_size, heads, *features)
    padding = [(0, 0)] * x.ndim
    padding[2] = (0, -plan.block_size % chunk)
    x = jnp.pad(x, padding)
    x = x.reshape(batch, x.shape[1], -1, chunk, heads, *features)
    return x.transpose(1, 2, 0, 4, 3, *range(5, x.ndim))


def _join(plan: Plan, x: Array, like: Array) -> Array:
    """Undo `_split`, in the shape and dtype of `like`."""
    x = x.astype(like.dtype).transpose(2, 0, 1, 4, 3, *range(5, x.ndim))
    x = x.reshape(*x.shape[:2], -1, *x.shape[4:])
    return x[:, :, : plan.block_size].reshape(like.shape)


def _chunk_size(plan: Plan) -> int:
    """Return the smallest multiple of 8 that covers a block in no more chunks than requested."""
    chunks = -(-plan.block_size // (plan.chunk_size or 64))
    return -(-plan.block_size // (8 * chunks)) * 8


def _tokens(plan: Plan, spec: str, x: Array, y: Array) -> Array:
    """Multiply operands in the keys' dtype, with sums in the state's dtype."""
    return _product(plan, spec, x, y, plan.operand)


def _states(plan: Plan, spec: str, x: Array, y: Array) -> Array:
    """Multiply operands in the state's dtype."""
    return _product(plan, spec, x, y, plan.state)


def _product(plan: Plan, spec: str, x: Array, y: Array, dtype: DTypeLike) -> Array:
    if dtype != plan.state:
        precision = lax.Precision.DEFAULT  # products of bfloat16 are exact in float32
    elif plan.operand != plan.state:
        precision = lax.Precision.HIGH  # three bf16 passes (TPU) or TF32 suit bfloat16 keys
    else:
        precision = lax.Precision.HIGHEST
    x, y = x.astype(dtype), y.astype(dtype)
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=plan.state)
