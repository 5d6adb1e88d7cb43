"""The public softmax attention: checks and the choice of an implementation."""

import importlib
import itertools
import logging
from functools import cache
from typing import Any, Literal, get_args, overload

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from pallas_kernels.attention.lse import with_lse

Implementation = Literal["xla", "cudnn", "splash", "gpu"]

# Modules of this folder, the fastest first. Each has `attention`, `attention_with_lse` and
# `unsupported_reason`, which returns why it cannot take the queries here, or None.
_BACKENDS = {"gpu": ("gpu", "cudnn", "xla"), "tpu": ("splash", "xla")}
_LOG = logging.getLogger("pallas_kernels")


@overload
def dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    key_length: ArrayLike | None = None,
    layer: ArrayLike | None = None,
    return_lse: Literal[False] = False,
    implementation: Implementation | None = None,
) -> Array: ...


@overload
def dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    key_length: ArrayLike | None = None,
    layer: ArrayLike | None = None,
    return_lse: Literal[True],
    implementation: Implementation | None = None,
) -> tuple[Array, Array]: ...


def dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    key_length: ArrayLike | None = None,
    layer: ArrayLike | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, Array]:
    """Compute bidirectional softmax attention, optionally over the filled part of a key buffer.

        out = softmax(q k^T / sqrt(D)) v

    Args:
        q: Queries [B, Tq, H, D], floating point.
        k: Keys [B, Tk, H, D], in the dtype of q; with `layer`, stacks [L, B, Tk, H, D].
        v: Values, in the shape and dtype of k.
        key_length: Visible keys, an integer scalar or [B], possibly traced; None means all. Keys
            and values past it have no influence; all but XLA need them finite (they multiply the
            rest of a tile by zero). With no visible key the output is zero.
        layer: The layer of the stacks to attend to, an integer scalar, possibly traced; clamped to
            the L there are. "gpu" reads it in place where 8 divides Tk, and all others slice.
        return_lse: Also return the log-sum-exp, with which `merge_attention` merges attentions to
            disjoint keys. Gradients of this form are XLA's on every implementation, and hold the
            matrix of scores in memory.
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
        out [B, Tq, H, D] in the dtype of q, or with return_lse (out, lse): lse, float32 [B, Tq, H],
        is the natural logarithm of the sum of exponentials of scaled scores over the visible keys,
        -inf where there are none.

    Raises:
        ValueError: A shape, dtype or option is none of the above.
        NotImplementedError: The named implementation cannot do this here.
    """
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    _check(q, k, v, layer is not None, implementation)
    if key_length is not None:
        key_length = _check_length(key_length, len(q))
    if layer is not None:
        layer = _check_layer(layer, len(k))
    backend = implementation or _fastest(q)
    module = _module(backend)
    if reason := module.unsupported_reason(q):
        raise NotImplementedError(f"implementation {backend!r} {reason}")
    if not return_lse:
        return module.attention(q, k, v, key_length, layer)
    if backend == "xla":
        return module.attention_with_lse(q, k, v, key_length, layer)
    return with_lse(module.attention_with_lse, q, k, v, key_length, layer)


def _module(backend: str) -> Any:
    # Imported when first used: Pallas's compilers are not needed everywhere.
    return importlib.import_module(f"pallas_kernels.attention.{backend}")


def _fastest(q: Array) -> str:
    platform = jax.default_backend()
    names = _BACKENDS.get(platform, ("xla",))
    reasons = [(name, _module(name).unsupported_reason(q)) for name in names]
    passed_over = list(itertools.takewhile(lambda pair: pair[1], reasons))
    backend = names[len(passed_over)]
    _log_choice(backend, platform, *(" ".join(pair) for pair in passed_over))
    return backend


@cache
def _log_choice(backend: str, platform: str, *passed_over: str) -> None:
    _LOG.info("; ".join((f"dot_product_attention: {backend} on {platform}", *passed_over)))


def _check(q: Array, k: Array, v: Array, stacked: bool, implementation: str | None) -> None:
    if q.ndim != 4:
        raise ValueError(f"q has shape {q.shape}; must be [B, Tq, H, D]")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"q has dtype {q.dtype}; must be floating point")
    batch, _, heads, dim = q.shape
    stack = k.shape[:1] if stacked else ()
    keys = k.shape[-3] if k.ndim > 2 else 0
    if k.shape != (*stack, batch, keys, heads, dim) or stack == (0,):
        form = "with layer [L, B, Tk, H, D]" if stacked else "without layer [B, Tk, H, D]"
        raise ValueError(f"k has shape {k.shape}; must be {form}, B, H, D as in q {q.shape}")
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


def _check_layer(layer: ArrayLike, layers: int) -> Array:
    index = jnp.asarray(layer)
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"layer has dtype {index.dtype}; must be an integer")
    if index.shape:
        raise ValueError(f"layer has shape {index.shape}; must be scalar")
    return jnp.clip(index.astype(jnp.int32), 0, layers - 1)
