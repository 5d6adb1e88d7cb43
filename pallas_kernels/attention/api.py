"""The public softmax attention: checks and the choice of an implementation."""

import importlib
import itertools
import logging
from functools import cache
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Implementation = Literal["xla", "cudnn", "splash", "gpu"]

# Modules of this folder, each with `attention` and an `obstacle`, which says why it cannot take the
# queries here; the fastest first.
_BACKENDS = {"gpu": ("gpu", "cudnn", "xla"), "tpu": ("splash", "xla")}
_LOG = logging.getLogger("pallas_kernels")


def dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    key_length: ArrayLike | None = None,
    implementation: Implementation | None = None,
) -> Array:
    """Bidirectional softmax attention, optionally over the filled part of a key buffer.

        out = softmax(q k^T / sqrt(D)) v

    Args:
        q: Queries [B, Tq, H, D], floating point.
        k: Keys [B, Tk, H, D], in the dtype of q.
        v: Values [B, Tk, H, D], in the dtype of q.
        key_length: Visible keys, an integer scalar or [B], possibly traced; None means all. Keys
            and values past it have no influence; all but XLA need them finite (they multiply the
            rest of a tile by zero). With no visible key the output is zero.
        implementation: None takes the fastest of these that can do this here, and logs it once. A
            named one never falls back.
            "gpu": Pallas for NVIDIA Hopper; half precision, head dimension 64 or 128. Cost follows
                key_length. Where it is differentiated, cuDNN runs in both directions.
            "cudnn": NVIDIA GPUs, half precision. Cost follows key_length.
            "splash": Pallas for TPUs, bfloat16. Forward, the products follow key_length, but the
                whole buffer is copied; backward, the whole buffer is multiplied.
            "xla": anywhere; the matrix of scores is held in memory.

    XLA cannot split "gpu" and "splash" over devices: under a mesh they need `jax.shard_map`.

    Returns:
        [B, Tq, H, D] in the dtype of q.

    Raises:
        ValueError: A shape, dtype or option is none of the above.
        NotImplementedError: The named implementation cannot do this here.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    _check(q, k, v, implementation)
    if key_length is not None:
        key_length = _check_length(key_length, len(q))
    backend = implementation or _fastest(q)
    if obstacle := _module(backend).obstacle(q):
        raise NotImplementedError(f"implementation {backend!r} {obstacle}")
    return _module(backend).attention(q, k, v, key_length)


def _module(backend: str) -> Any:
    # Imported when first used: Pallas's compilers are not needed everywhere.
    return importlib.import_module(f"pallas_kernels.attention.{backend}")


def _fastest(q: Array) -> str:
    platform = jax.default_backend()
    names = _BACKENDS.get(platform, ("xla",))
    obstacles = [(name, _module(name).obstacle(q)) for name in names]
    passed_over = list(itertools.takewhile(lambda pair: pair[1], obstacles))
    backend = names[len(passed_over)]
    _log_choice(backend, platform, *(" ".join(pair) for pair in passed_over))
    return backend


@cache
def _log_choice(backend: str, platform: str, *obstacles: str) -> None:
    _LOG.info("; ".join((f"dot_product_attention: {backend} on {platform}", *obstacles)))


def _check(q: Array, k: Array, v: Array, implementation: str | None) -> None:
    if q.ndim != 4:
        raise ValueError(f"q has shape {q.shape}; must be [B, Tq, H, D]")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q has dtype {q.dtype}; must be floating point")
    batch, _, heads, dim = q.shape
    if k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (batch, heads, dim):
        raise ValueError(
            f"k has shape {k.shape}; must be [B, Tk, H, D] with B, H, D as in q {q.shape}"
        )
    if v.shape != k.shape:
        raise ValueError(f"v has shape {v.shape}; must be that of k, {k.shape}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}; must be that of q, {q.dtype}")
    if implementation is not None and implementation not in get_args(Implementation):
        names = ", ".join(get_args(Implementation))
        raise ValueError(f"implementation is {implementation!r}; must be None or one of {names}")


def _check_length(key_length: ArrayLike, batch: int) -> Array:
    length = jnp.asarray(key_length)
    if not jnp.issubdtype(length.dtype, jnp.integer):
        raise ValueError(f"key_length has dtype {length.dtype}; must be an integer")
    if length.shape not in ((), (batch,)):
        raise ValueError(f"key_length has shape {length.shape}; must be scalar or [B] = ({batch},)")
    return jnp.broadcast_to(length, (batch,)).astype(jnp.int32)
