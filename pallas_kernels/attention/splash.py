"""Softmax attention on TPUs by JAX's splash attention, a flash attention in Pallas."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info

from pallas_kernels.attention.layers import of_layer
from pallas_kernels.attention.lengths import padded, visible
from pallas_kernels.attention.remat import SPLASH_RESULTS
from pallas_kernels.devices import unsupported_mesh_reason

_LANES = 128


def unsupported_reason(q: Array) -> str | None:
    """Return why splash attention cannot take these queries here, or None."""
    if jax.default_backend() != "tpu":
        return f"needs a TPU; the device is {jax.devices()[0].device_kind}"
    if q.dtype != jnp.bfloat16:
        return f"needs bfloat16, in which it multiplies; q has {q.dtype}"
    if q.shape[-1] % 64:
        return f"needs a head dimension in multiples of 64; q has {q.shape[-1]}"
    return unsupported_mesh_reason()


def attention(
    q: Array,
    k: Array,
    v: Array,
    key_length: Array | None,
    layer: Array | None = None,
    *,
    interpret: bool = False,
) -> Array:
    """Compute attention; tokens are padded to whole blocks, and keys past the length are masked."""
    out, _ = _attend(q, *of_layer(k, v, layer), key_length, interpret, save_lse=False)
    return out


def attention_with_lse(
    q: Array,
    k: Array,
    v: Array,
    key_length: Array | None,
    layer: Array | None = None,
    *,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Compute attention and its log-sum-exp, float32 [B, Tq, H]; JAX cannot differentiate it."""
    return _attend(q, *of_layer(k, v, layer), key_length, interpret, save_lse=True)


def _attend(
    q: Array, k: Array, v: Array, key_length: Array | None, interpret: bool, save_lse: bool
) -> tuple[Any, Any]:
    """Return output, and log-sum-exp or None."""
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    length = visible(key_length, batch, keys)
    rows, columns = _block(queries), _block(keys)
    q = q * jnp.asarray(1 / math.sqrt(dim), q.dtype)
    q, k, v = (padded(x, n).swapaxes(1, 2) for x, n in ((q, rows), (k, columns), (v, columns)))
    masked = key_length is not None or k.shape[2] > keys

    def attend(q, k, v, length) -> Any:
        kernel = _kernel(heads, q.shape[1], k.shape[1], rows, columns, interpret, save_lse)
        ids = None
        if key_length is not None:
            kernel.fwd_mask_info = _filled_blocks(length, q.shape[1] // rows, k.shape[1], columns)
        if masked:
            shown = jnp.arange(k.shape[1]) < length
            ids = splash.SegmentIds(jnp.ones(q.shape[1], jnp.int32), shown.astype(jnp.int32))
        found = kernel(q, k, v, segment_ids=ids)
        out, lse = (found[0], found[1][0]) if save_lse else (found, None)
        if masked:
            out = jnp.where(length > 0, out, 0)
            lse = None if lse is None else jnp.where(length > 0, lse, -jnp.inf)
        return out, lse

    found = jax.vmap(attend)(q, k, v, length)
    return jax.tree.map(lambda x: x.swapaxes(1, 2)[:, :queries], found)


def _kernel(
    heads: int, queries: int, keys: int, rows: int, columns: int, interpret: bool, save_lse: bool
) -> Any:
    sizes = splash.BlockSizes(
        block_q=rows, block_kv=columns,
        block_q_dkv=rows, block_kv_dkv=columns,
        block_q_dq=rows, block_kv_dq=columns,
    )  # fmt: skip
    mask = splash.MultiHeadMask([splash.FullMask((queries, keys))] * heads)
    return splash.make_splash_mha_single_device(
        mask,
        block_sizes=sizes,
        interpret=interpret,
        save_residuals=save_lse,
        residual_checkpoint_name=SPLASH_RESULTS,
    )


def _block(length: int) -> int:
    """Return the largest block size, up to 1024, of those that pad the length least."""
    if length <= 512:
        return -(-length // _LANES) * _LANES
    return min(range(1024, 511, -_LANES), key=lambda block: -length % block)


def _filled_blocks(length: Array, row_blocks: int, keys: int, columns: int):
    """Return a mask that makes the forward pass skip blocks of keys past the length."""
    last = jnp.maximum(length - 1, 0) // columns
    block = jnp.broadcast_to(jnp.arange(keys // columns), (1, row_blocks, keys // columns))
    return splash_attention_mask_info.MaskInfo(
        data_next=jnp.minimum(block, last).astype(jnp.int16),
        mask_next=None,
        block_mask=(2 * (block <= last)).astype(jnp.int8),
        partial_mask_blocks=None,
        q_sequence=None,
    )
