"""Inputs of the tests of softmax attention, and its definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dot_product_attention

BATCH, QUERIES, KEYS, HEADS, DIM = 2, 5, 12, 3, 8
xla = functools.partial(dot_product_attention, implementation="xla")


def make_inputs(dtype=np.float32, queries=QUERIES, keys=KEYS, dim=DIM):
    rng = np.random.default_rng(0)
    sizes = [(BATCH, n, HEADS, dim) for n in (queries, keys, keys)]
    return tuple(jnp.asarray(rng.normal(size=size), dtype) for size in sizes)


def oracle(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


def lse_oracle(q, k, lengths):
    """Natural log-sum-exp [B, Tq, H] of the first keys of each row, in float64."""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    scores = np.einsum("bqhd,bkhd->bqhk", q, k) / np.sqrt(q.shape[-1])
    rows = [np.logaddexp.reduce(x[..., :n], axis=-1) for x, n in zip(scores, lengths, strict=True)]
    return np.stack(rows)


def with_gradients(call, *inputs):
    """Results of a form with lse, and gradients of a loss of out and lse that leaves out -inf."""

    def loss(*inputs):
        out, lse = call(*inputs)
        finite = jnp.where(jnp.isfinite(lse), lse, 0)
        return jnp.sin(out.astype(jnp.float32)).sum() + jnp.cos(3 * finite).sum()

    return *call(*inputs), *jax.grad(loss, argnums=tuple(range(len(inputs))))(*inputs)


def relative_error(x, expected):
    x, expected = (np.asarray(x, np.float64) for x in (x, expected))
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)
