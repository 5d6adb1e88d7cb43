"""Attentions to parts of the keys, merged, are attention to all of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    KEYS,
    make_inputs,
    with_gradients,
    xla,
)

from pallas_kernels import merge_attention

# Every split leaves the order of keys; two have an empty part.
SPLITS = [(5,), (1, 8), (0,), (3, 3)]


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("length", [None, [0, 4], [12, 9]])
def test_merged_parts_equal_the_whole(length, splits):
    """Values and gradients; parts may be empty, or hidden in full for some rows."""
    inputs = make_inputs()
    edges = [0, *splits, KEYS]
    shown = jnp.asarray([KEYS, KEYS] if length is None else length)

    def merged(q, k, v):
        parts = []
        for start, end in itertools.pairwise(edges):
            some = None if length is None else jnp.maximum(shown - start, 0)
            part = (q, k[:, start:end], v[:, start:end])
            parts.append(xla(*part, key_length=some, return_lse=True))
        return merge_attention(parts)

    whole = functools.partial(xla, key_length=shown, return_lse=True)
    found, expected = (
        jax.jit(functools.partial(with_gradients, f))(*inputs) for f in (merged, whole)
    )
    for x, y in zip(found, expected, strict=True):
        # float32, in another order of sums.
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6)


def test_merging_nothing_is_nothing():
    """Zeros and -inf, without NaN in any gradient."""
    q = make_inputs()[0]
    parts = [(jnp.zeros_like(q), jnp.full(q.shape[:3], -jnp.inf))] * 3
    out, lse = merge_attention(parts)
    assert (out == 0).all() and (lse == -jnp.inf).all()
    _, vjp = jax.vjp(merge_attention, parts)
    (cotangents,) = vjp((jnp.ones_like(out), jnp.ones_like(lse)))
    assert all((x == 0).all() for x in jax.tree.leaves(cotangents))


def test_merging_keeps_the_first_dtype_and_far_apart_sums():
    q = make_inputs(jnp.bfloat16)[0]
    level = jnp.full(q.shape[:3], 1.0)
    out, lse = merge_attention([(q, 1e4 * level), (2 * q.astype(jnp.float32), -1e4 * level)])
    assert (out.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(out, q)
    np.testing.assert_array_equal(lse, 1e4 * level)
    out, lse = merge_attention([(q, level)])
    np.testing.assert_array_equal(out, q)
    np.testing.assert_array_equal(lse, level)


NO_PARTS = np.zeros((2, 5, 3, 8)), np.zeros((2, 5, 3))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "parts is empty"),
        ([(np.zeros((5, 3, 8)), np.zeros((5, 3)))], r"out of part 0 .* must be \[B, Tq, H, D\]"),
        ([NO_PARTS, (np.zeros((2, 6, 3, 8)), NO_PARTS[1])], "out of part 1 .* that of part 0"),
        ([NO_PARTS, (NO_PARTS[0], np.zeros((2, 3, 5)))], r"lse of part 1 .* must be \(2, 5, 3\)"),
    ],
)
def test_parts_that_cannot_be_merged(parts, message):
    with pytest.raises(ValueError, match=message) as error:
        merge_attention(parts)
    assert "\n" not in str(error.value)
