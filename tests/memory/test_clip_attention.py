"""All forms of the clip's softmax attention, and the derivative that one of them brings along."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax.memory import clip_attention
from arl2_jax.memory.clip_attention import attend_batched, attend_block_by_block, attend_merged

# [B, copies, blocks, n, H, D]; five blocks do not go into pairs.
SHAPE = (2, 2, 5, 3, 2, 8)
# Float32 sums of some dozen terms of size 1 in another order.
CLOSE = 1e-5


def draw(seed, shape=SHAPE):
    keys = jax.random.split(jax.random.key(seed), 4)
    return [jax.random.normal(key, shape) for key in keys]


def value_and_gradients(attend, q, k, v, weights):
    loss = lambda q, k, v: jnp.sum(attend(q, k, v) * weights)
    return attend(q, k, v), jax.grad(loss, argnums=(0, 1, 2))(q, k, v)


def by_definition(q, k, v):
    """Every query of every copy beside one long row of clean keys and its own block's."""
    out = np.zeros_like(q)
    for b, copy, i, token, h in np.ndindex(*q.shape[:-1]):
        keys = np.concatenate([*k[b, 0, :i, :, h], k[b, copy, i, :, h]])
        values = np.concatenate([*v[b, 0, :i, :, h], v[b, copy, i, :, h]])
        scores = keys @ q[b, copy, i, token, h] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, copy, i, token, h] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("attend", [attend_block_by_block, attend_batched, attend_merged])
def test_every_block_sees_the_clean_past_and_itself(attend):
    q, k, v, _ = draw(0)
    expected = by_definition(*(np.asarray(x, np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(attend(q, k, v), expected, rtol=CLOSE, atol=CLOSE)


def test_all_forms_have_the_same_derivatives():
    # Scores of size 10: softmax is far from a mean, and rows have weights that vanish.
    q, k, v, weights = draw(1)
    expected = value_and_gradients(attend_block_by_block, 4 * q, 4 * k, v, weights)
    # Ten times CLOSE: derivatives by q and k have factors of 4.
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)
    for attend in (attend_batched, attend_merged):
        found = value_and_gradients(attend, 4 * q, 4 * k, v, weights)
        jax.tree.map(close, found, expected)


def test_huge_scores_stay_finite():
    q, k, v, weights = draw(2)
    for attend in (attend_block_by_block, attend_batched, attend_merged):
        found = value_and_gradients(attend, 1e3 * q, 1e3 * k, v, weights)
        assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(found))


def test_the_derivative_of_what_blocks_see_is_that_of_slices():
    x = draw(3)[0][:, 0]
    plain = lambda x: tuple(x[:, :i].reshape(len(x), -1, *x.shape[3:]) for i in range(x.shape[1]))
    seen, pull_back = jax.vjp(plain, x)
    cotangents = tuple(jnp.cos(jnp.arange(y.size).reshape(y.shape)) for y in seen)
    _, own_pull_back = jax.vjp(clip_attention._before, x)
    np.testing.assert_allclose(
        own_pull_back(cotangents)[0],
        pull_back(cotangents)[0],
        rtol=CLOSE,
        atol=CLOSE,
    )


@pytest.mark.parametrize("copies", [1, 3])
def test_other_numbers_of_copies(copies):
    q, k, v, _ = draw(4, (1, copies, 3, 2, 2, 8))
    expected = by_definition(*(np.asarray(x, np.float64) for x in (q, k, v)))
    np.testing.assert_allclose(
        clip_attention.attend_blocks(q, k, v), expected, rtol=CLOSE, atol=CLOSE
    )


def test_half_precision_comes_back_in_half_precision():
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in draw(5))
    found, expected = attend_batched(q, k, v), attend_block_by_block(q, k, v)
    assert found.dtype == jnp.bfloat16
    # One rounds weights and results to 8 bits, the other results alone.
    np.testing.assert_allclose(
        found.astype(jnp.float32), expected.astype(jnp.float32), rtol=2e-2, atol=2e-2
    )
