"""Checks of the arguments of the gated delta rule: one-line errors before compilation."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

Implementation = Literal["reference", "xla", "tpu", "gpu"]
Precision = Literal["default", "high"]


def state_dtype(k: Array) -> Any:
    """Return the dtype of states, gates and sums for these keys."""
    return jnp.dtype(jnp.float64 if k.dtype == jnp.float64 else jnp.float32)


def check_options(implementation: str | None, precision: str, chunk_size: int | None) -> None:
    """Raise ValueError for an unknown option."""
    if implementation is not None and implementation not in get_args(Implementation):
        names = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation is {implementation!r}; must be None or one of {names}")
    if precision not in get_args(Precision):
        names = ", ".join(get_args(Precision))
        raise ValueError(f"precision is {precision!r}; must be one of {names}")
    if chunk_size is not None and (chunk_size < 8 or chunk_size % 8):
        raise ValueError(f"chunk_size is {chunk_size}; must be a positive multiple of 8")


def check_tokens(k: Array, v: Array, g: Array, beta: Array, block_size: int) -> None:
    """Raise ValueError for a wrong shape, dtype or token count, or a concrete positive g."""
    if k.ndim != 4:
        raise ValueError(f"k has shape {k.shape}; must be [B, T, H, K]")
    if k.dtype not in (jnp.float32, jnp.bfloat16, jnp.float64):
        raise ValueError(f"k has dtype {k.dtype}; must be float32, bfloat16 or float64")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"v has shape {v.shape}; must be [B, T, H, V] with B, T, H as in k {k.shape}"
        )
    if v.dtype != k.dtype:
        raise ValueError(f"v has dtype {v.dtype}; must be that of k, {k.dtype}")
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != k.shape[:3]:
            raise ValueError(f"{name} has shape {x.shape}; must be [B, T, H] = {k.shape[:3]}")
        if x.dtype != state_dtype(k):
            raise ValueError(
                f"{name} has dtype {x.dtype}; must be {state_dtype(k)} for {k.dtype} k"
            )
    if block_size < 1 or k.shape[1] < 1 or k.shape[1] % block_size:
        raise ValueError(f"block_size is {block_size}; must divide the {k.shape[1]} tokens of k")
    if not isinstance(g, Tracer) and g.is_fully_addressable:
        with jax.ensure_compile_time_eval():
            largest = float(g.max())
        if largest > 0:
            raise ValueError(f"g reaches {largest}; must be at most 0")


def check_state(k: Array, v: Array, initial_state: Array) -> None:
    """Raise ValueError for an initial state of a wrong shape or dtype."""
    shape = (k.shape[0], *k.shape[2:], v.shape[3])
    if initial_state.shape != shape:
        raise ValueError(f"initial_state has shape {initial_state.shape}; must be {shape}")
    if initial_state.dtype != state_dtype(k):
        dtype = initial_state.dtype
        raise ValueError(f"initial_state has dtype {dtype}; must be {state_dtype(k)}")
