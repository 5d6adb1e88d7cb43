"""Inputs of the gated delta rule on which kernels break, and the recurrence in float64.

For any implementation, as a function of five arrays and `block_size`:

    inputs = make_inputs(195, **CASES["identical keys, beta 1.999, g 0"])
    run = states_and_gradients(function, block_size=65)
    results = run(inputs, make_cotangent(inputs, 65))
    assert_close(results, oracle(inputs, 65), TOLERANCES["float32"])
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import gated_delta_states

NAMES = ("states", "k", "v", "g", "beta", "initial_state")

KEYS: dict[str, dict[str, Any]] = {
    "independent keys": {"correlation": 0},
    "correlation 0.5": {"correlation": 0.5},
    "correlation 0.9": {"correlation": 0.9},
    "correlation 0.99": {"correlation": 0.99},
    "identical keys": {"correlation": 1},
    "repeated frames": {"frame": 13},
}
BETAS: dict[str, dict[str, Any]] = {f"beta {x:g}": {"beta": x} for x in (0, 1, 1.999)}
DECAYS: dict[str, dict[str, Any]] = {f"g {x:g}": {"g": x} for x in (0, -1e-4, -1, -20)}
DECAYS["reset"] = {"reset": True}

# Options of make_inputs, by a name such as "correlation 0.9, beta 1, g -20".
CASES = {
    ", ".join(names): KEYS[names[0]] | BETAS[names[1]] | DECAYS[names[2]]
    for names in itertools.product(KEYS, BETAS, DECAYS)
}

# Relative errors allowed, by what keys and products are: "high" takes bfloat16 keys. Gradients of g
# and beta are small differences of larger sums.
TOLERANCES = {
    "float32": dict.fromkeys(NAMES, 1e-5) | dict.fromkeys(("g", "beta"), 1e-4),
    # Gradients of bfloat16 arguments are rounded to bfloat16 in the end: half a unit, 2^-9.
    "high": dict.fromkeys(NAMES, 1e-4) | dict.fromkeys(("k", "v"), 1e-4 + 2**-9),
    "bfloat16": dict.fromkeys(NAMES, 1e-2) | dict.fromkeys(("g", "beta"), 3e-2),
}


def undamped(case: str) -> bool:
    """Whether all tokens of a case nearly reflect the state, so that rounding errors add up."""
    return "beta 1.999" in case and not case.endswith(("g -1", "g -20"))


def make_inputs(
    time: int,
    *,
    batch: int = 2,
    heads: int = 2,
    key: int = 16,
    value: int = 24,
    correlation: float = 0.9,
    frame: int | None = None,
    beta: float | None = None,
    g: float | None = None,
    reset: bool = False,
    seed: int = 0,
) -> tuple[np.ndarray, ...]:
    """k, v, g, beta, initial_state in float32.

    Keys share a direction, as those of video do. `frame`: every so many tokens the same keys come
    again, as in a still video. `beta`, `g`: one value for all tokens. `reset`: the token in the
    middle forgets everything.
    """
    rng = np.random.default_rng(seed)
    own, common = (rng.normal(size=(batch, n, heads, key)) for n in (time, 1))
    k = np.sqrt(1 - correlation) * own + np.sqrt(correlation) * common
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    if frame:
        k = k[:, np.arange(time) % frame]
    v = rng.normal(size=(batch, time, heads, value))
    decay = -np.exp(rng.normal(size=(batch, time, heads)) - 4)
    writing = rng.uniform(0, 1.999, size=(batch, time, heads))
    initial_state = rng.normal(size=(batch, heads, key, value))
    if g is not None:
        decay[:] = g
    if reset:
        decay[:, time // 2] = -1e4
    if beta is not None:
        writing[:] = beta
    return tuple(x.astype(np.float32) for x in (k, v, decay, writing, initial_state))


def in_bfloat16(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same inputs with keys and values rounded to bfloat16."""
    k, v, *rest = inputs
    return (jnp.asarray(k, jnp.bfloat16), jnp.asarray(v, jnp.bfloat16), *rest)


def make_cotangent(inputs: tuple[Any, ...], block_size: int) -> np.ndarray:
    """A random cotangent of all states."""
    k, v, g = inputs[:3]
    shape = (k.shape[0], k.shape[1] // block_size + 1, k.shape[2], k.shape[3], v.shape[3])
    return np.random.default_rng(1).normal(size=shape).astype(g.dtype)


@functools.cache
def states_and_gradients(function=gated_delta_states, **options):
    """Jitted (inputs, cotangent of all states) -> (states, five gradients)."""

    @jax.jit
    def run(inputs, cotangent):
        states, vjp = jax.vjp(functools.partial(function, **options), *inputs)
        return (states, *vjp(cotangent))

    return run


def oracle(inputs: tuple[Any, ...], block_size: int) -> list[np.ndarray]:
    """States and gradients of the recurrence, token by token in float64."""
    with jax.enable_x64(True):
        run = states_and_gradients(block_size=block_size, implementation="reference")
        inputs = tuple(np.asarray(x, np.float64) for x in inputs)
        results = run(inputs, make_cotangent(inputs, block_size))
        assert all(x.dtype == np.float64 for x in results)
        return [np.asarray(x) for x in results]


def assert_close(results, expected, tolerances: dict[str, float], factor: float = 1) -> None:
    """Compares states and gradients by the relative error of each; NaN is never close."""
    expected = dict(zip(NAMES, expected, strict=True))
    for (name, y), x in zip(expected.items(), results, strict=True):
        size = max(np.linalg.norm(y), 1e-30)
        if name == "g":
            # With identical keys and beta = 1 it is what rounding leaves of 1 - |k|^2.
            size = max(size, 1e-3 * np.linalg.norm(expected["beta"]))
        error = np.linalg.norm(np.asarray(x, np.float64) - y) / size
        assert error <= factor * tolerances[name], f"{name}: {error:.1e}"


def assert_matches(run, inputs, block_size, operands="float32", factor: float = 1, **options):
    """Compares run(inputs, block_size, **options) with the oracle; operands are of TOLERANCES."""
    if operands != "float32":
        inputs = in_bfloat16(inputs)
    if operands == "high":
        options["precision"] = "high"
    results = run(inputs, block_size, **options)
    assert [x.dtype for x in results[1:]] == [x.dtype for x in inputs]
    assert_close(results, oracle(inputs, block_size), TOLERANCES[operands], factor)
