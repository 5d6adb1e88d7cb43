"""Measures of retention against the recurrence in float64 NumPy, and where their value is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax.memory.gated_delta import Writes
from arl2_jax.memory.retention import (
    measure_memory,
    measure_writes,
    participation,
    share_kept,
    survival,
    transitions,
    weights_at_end,
)
from arl2_jax.models.wan import make_layer
from arl2_jax.nn.positions import video_grid

measure = jax.jit(measure_writes, static_argnums=1)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def make_writes(time, *, batch=1, heads=2, width=8, beta=None, g=None, seed=0):
    """Independent unit keys; strength and decay random, or one for all tokens."""
    rng = np.random.default_rng(seed)
    shape = (batch, time, heads)
    k, v = unit(rng.normal(size=(*shape, width))), rng.normal(size=(*shape, width))
    g = -np.exp(rng.normal(size=shape) - 3) if g is None else np.full(shape, g)
    beta = rng.uniform(0, 2, shape) if beta is None else np.full(shape, beta)
    return Writes(*(jnp.asarray(x, jnp.float32) for x in (k, v, g, beta)))


def token_by_token(writes, blocks):
    """Transitions of the blocks of clip 0, and c_t of its tokens, in float64."""
    k, _, g, beta = (np.asarray(x, np.float64)[0] for x in writes)
    time, heads, width = k.shape
    found = np.zeros((blocks, heads, width, width))
    c = np.zeros((time, heads, width))
    for h in range(heads):
        for b in range(blocks):
            A = np.eye(width)
            for t in range(b * time // blocks, (b + 1) * time // blocks):
                A = np.exp(g[t, h]) * A
                A = A - beta[t, h] * np.outer(k[t, h], k[t, h] @ A)
            found[b, h] = A
        after = np.eye(width)  # what comes after token t
        for t in reversed(range(time)):
            c[t, h] = beta[t, h] * after @ k[t, h]
            own = np.exp(g[t, h]) * (np.eye(width) - beta[t, h] * np.outer(k[t, h], k[t, h]))
            after = after @ own
    return found, c


def test_all_measures_are_those_of_the_recurrence():
    writes, blocks, time, width = make_writes(36, batch=2), 4, 36, 8
    found = measure(writes, blocks)
    A, c = token_by_token(writes, blocks)
    frobenius = lambda x: np.linalg.norm(x, axis=(-2, -1)) / np.sqrt(width)
    singular = np.linalg.svd(A, compute_uv=False)
    w = np.linalg.norm(c, axis=-1)
    by_block = w.reshape(blocks, -1, 2).sum(axis=1)
    number = lambda w: w.sum(axis=0) ** 2 / (w**2).sum(axis=0)
    g, beta = (np.asarray(x, np.float64)[0] for x in writes[2:])
    wanted = {
        "retention": frobenius(A).mean(axis=0),
        "best_kept": singular[..., 0].mean(axis=0),
        "least_kept": singular[..., -1].mean(axis=0),
        "decay": np.exp(g.reshape(blocks, -1, 2).sum(axis=1)).mean(axis=0),
        "beta": beta.mean(axis=0),
        "load": time / blocks * beta.mean(axis=0) / width,
        "tokens": number(w),
        "blocks": number(by_block),
        "survival_1": frobenius(A).mean(axis=0),
        "survival_2": frobenius(A[1:] @ A[:-1]).mean(axis=0),
        "survival_4": frobenius(A[3] @ A[2] @ A[1] @ A[0]),
    }
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # Rounding of float32 over 36 tokens; it is absolute for the direction that is kept least.
        np.testing.assert_allclose(found[name][0], value, rtol=2e-5, atol=1e-7, err_msg=name)
        assert not np.allclose(found[name][1], value, rtol=1e-3)  # clips are measured apart


def test_the_final_state_is_the_values_under_their_weights():
    """The defining property of c_t, on a state that the recurrence itself has made."""
    writes = make_writes(24, width=6)
    A, c = token_by_token(writes, 3)
    k, v, g, beta = (np.asarray(x, np.float64)[0] for x in writes)
    S = np.zeros((2, 6, 6))
    for t in range(24):
        for h in range(2):
            S[h] *= np.exp(g[t, h])
            S[h] += beta[t, h] * np.outer(k[t, h], v[t, h] - S[h].T @ k[t, h])
    np.testing.assert_allclose(np.einsum("thi,thj->hij", c, v), S, atol=1e-12)
    weights = jax.jit(weights_at_end, static_argnums=1)(writes, 3)
    assert weights.shape == (1, 3, 8, 2)
    np.testing.assert_allclose(
        weights.reshape(24, 2), np.linalg.norm(c, axis=-1), rtol=2e-5, atol=1e-7
    )
    np.testing.assert_allclose(transitions(writes, 3)[0], A, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("beta", "g"), [(0.05, 0.0), (1.0, 0.0), (0.3, -0.01), (1.9, -0.02)])
def test_independent_keys_keep_what_the_closed_form_says(beta, g):
    """E ||A||_F^2 / D = exp(2 n g) (1 - beta (2 - beta) / D)^n for keys of any direction."""
    n, width = 64, 16
    writes = make_writes(n, heads=64, batch=4, width=width, beta=beta, g=g)
    found = measure(writes, 1)
    share = float(np.sqrt(np.mean(np.square(found["retention"]))))
    wanted = np.exp(n * g) * (1 - beta * (2 - beta) / width) ** (n / 2)
    # 256 draws, of which r^2 spreads by at most 0.28 of its mean: a standard error below 0.9 %.
    assert share == pytest.approx(wanted, rel=0.03)
    np.testing.assert_allclose(found["decay"], np.exp(n * g), rtol=1e-5)
    np.testing.assert_allclose(found["load"], n * beta / width, rtol=1e-5)


def test_bfloat16_keys_are_measured_as_well():
    writes = make_writes(128, width=16)
    half = writes._replace(k=writes.k.astype(jnp.bfloat16), v=writes.v.astype(jnp.bfloat16))
    found, wanted = measure(half, 2), measure(writes, 2)
    for name in ("retention", "best_kept", "survival_2", "tokens", "blocks"):
        # Keys are off by 2^-9, in 64 tokens a block at random.
        np.testing.assert_allclose(found[name], wanted[name], rtol=3e-2, err_msg=name)


def test_without_writes_the_decay_is_all_there_is():
    writes = make_writes(32, beta=1e-9, g=-0.05)
    found = measure(writes, 4)
    for name in ("retention", "best_kept", "least_kept", "decay"):
        np.testing.assert_allclose(found[name], np.exp(-8 * 0.05), rtol=1e-5)
    for lag in (1, 2, 4):
        np.testing.assert_allclose(found[f"survival_{lag}"], np.exp(-8 * 0.05 * lag), rtol=1e-5)


def test_orthonormal_keys_erase_their_share_of_the_directions():
    """Three of eight directions are erased in block 0, the other five in block 1."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    k = np.zeros((1, 10, 1, 8))
    k[0, :3, 0], k[0, 5:, 0] = basis[:3], basis[3:]
    beta = (np.linalg.norm(k, axis=-1) > 0).astype(float)
    writes = Writes(*(jnp.asarray(x, jnp.float32) for x in (k, k, 0 * beta, beta)))
    A = transitions(writes, 2)
    # Rounding of float32; the root makes 3e-4 of the 1e-7 that are left of an erased direction.
    np.testing.assert_allclose(share_kept(A)[0, :, 0], np.sqrt([5 / 8, 3 / 8]), atol=1e-6)
    np.testing.assert_allclose(survival(A, 2), 0, atol=1e-6)
    found = measure(writes, 2)
    np.testing.assert_allclose(found["best_kept"], 1, atol=1e-6)
    np.testing.assert_allclose(found["least_kept"], 0, atol=1e-6)
    # All eight tokens that write stand in the end, and nothing of the two others.
    np.testing.assert_allclose(found["tokens"], 8, rtol=1e-5)
    np.testing.assert_allclose(found["blocks"], 64 / (9 + 25), rtol=1e-5)


def test_shares_below_the_range_of_squares_are_kept():
    """What is left after strong decay is small, but not nothing: exp(-80) is 1.8e-35."""
    writes = make_writes(8, beta=1e-9, g=-10.0)
    found = measure(writes, 1)
    np.testing.assert_allclose(found["retention"], np.exp(-80.0), rtol=1e-4)
    # The last of equal tokens outweighs the one before by exp(10).
    np.testing.assert_allclose(found["tokens"], 1, rtol=1e-3)


def test_nothing_written_is_told_without_dividing_by_zero():
    found = measure(make_writes(8, beta=0.0, g=-0.1), 2)
    assert all(np.isfinite(value).all() for value in found.values())
    assert np.all(found["tokens"] == 0) and np.all(found["blocks"] == 0)
    erased = measure(make_writes(8, beta=1.0, g=-1e4), 2)
    assert all(np.isfinite(value).all() for value in erased.values())
    assert np.all(erased["retention"] == 0) and np.all(erased["survival_2"] == 0)


def test_participation_counts():
    weights = np.array([[1.0, 1, 1, 0], [5e-30, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    np.testing.assert_allclose(participation(jnp.asarray(weights), 1), [3, 1, 0], rtol=1e-6)


def test_lags_longer_than_the_clip_are_refused_and_left_out():
    writes = make_writes(12)
    assert {n for n in measure(writes, 3) if n.startswith("survival")} == {
        "survival_1",
        "survival_2",
    }
    with pytest.raises(ValueError, match=r"lag=4 must be within 1\.\.3"):
        survival(transitions(writes, 3), 4)


def test_reads_against_local_are_those_of_the_block_form(cfg, params):
    """What a block adds to its own attention, block after block with the state carried along."""
    frames, rows, columns, blocks = 2, 2, 3, 3
    layer = make_layer(cfg, 0, params["blocks"]["0"])
    project, delta = layer.self_attn.project, layer.memory
    measured = jax.jit(partial(measure_memory, delta, blocks=blocks))
    attend, write = jax.jit(lambda *a: delta.attend(*a)[0]), jax.jit(delta.write)
    n = frames * rows * columns
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, blocks * n, cfg.dim)), jnp.float32)
    grid = video_grid(0, blocks * frames, rows, columns, cfg.head_dim)
    measures = measured(project(x), grid)

    state, reads, local = delta.init_state(2), [], []
    empty = state
    for i in range(blocks):
        own = video_grid(i * frames, frames, rows, columns, cfg.head_dim)
        p = project(x[:, i * n : (i + 1) * n])
        local.append(attend(p, empty, own))
        reads.append(attend(p, state, own) - local[-1])
        state = write(p, None, state, own)
    rms = lambda parts: np.sqrt(np.mean(np.square(parts[1:]), axis=(0, 2, 4)))
    np.testing.assert_allclose(measures["read_to_local"], rms(reads) / rms(local), rtol=1e-4)
    assert np.all(reads[0] == 0)
    alone = jax.eval_shape(lambda p: measure_memory(delta, p, grid, 1), project(x))
    assert not any(name in alone for name in ("survival_2", "survival_4"))
