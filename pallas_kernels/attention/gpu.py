"""Softmax attention on NVIDIA Hopper: a flash attention forward in Pallas Mosaic-GPU.

A CTA takes 128 queries of a head. Two warpgroups take 64 of them each, with their output and the
softmax's running maximum and sum in registers; a third one feeds both with tiles of 128 keys and
values by asynchronous copies. While the tensor cores multiply the scores of a tile and the weighted
values of the previous tile, the warpgroup turns the scores into weights as soon as they are ready.

Tiles come last to first, so that the partly filled one is masked once, before the loop. Copies fill
rows past an array's end with zeros, and do not write there. A number of tokens that is not a
multiple of 8 costs a padded copy. A layer of stacked keys is read in place: the stack's first two
axes become one, of which a CTA takes the row layer * B + row.

The log-sum-exp of a row follows from the maximum and the sum that the softmax keeps. Shared memory
has no room for it, so it goes from registers to device memory. Such stores are not bounds-checked,
so their array has whole tiles.

Source: FlashAttention-3, arXiv 2407.08608.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import cudnn
from pallas_kernels.attention.layers import of_layer
from pallas_kernels.attention.lengths import padded, visible
from pallas_kernels.devices import unsupported_mesh_reason

_WARPGROUPS, _ROWS, _KEYS, _STAGES = 2, 64, 128, 3
_QUERIES = _WARPGROUPS * _ROWS  # of a CTA
_TILE_ROWS = 8  # of a tile of 64 columns in shared memory
_HIDDEN = -1e30  # finite, so that rows without any visible key stay finite


class _Shared(NamedTuple):
    """Tiles in shared memory; barriers that signal that they are ready, or free again."""

    q: Any  # and later the output
    k: Any
    v: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any


def unsupported_reason(q: Array) -> str | None:
    """Return why the kernel cannot take these queries here, or None."""
    if missing := cudnn.no_nvidia():
        return missing
    capability = jax.devices()[0].compute_capability
    if capability != "9.0":
        return f"needs compute capability 9.0 (Hopper); the device has {capability}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16; q has {q.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"needs a head dimension of 64 or 128; q has {q.shape[-1]}"
    return unsupported_mesh_reason()


@jax.custom_vjp
def attention(
    q: Array, k: Array, v: Array, key_length: Array | None, layer: Array | None = None
) -> Array:
    """Compute attention by the kernel; where it is differentiated, by cuDNN in both directions."""
    # The log-sum-exp costs nothing. Keeping it makes this the same program as the form that
    # returns it, so that XLA merges two calls on the same arrays.
    out, _ = lax.optimization_barrier(_call(q, k, v, key_length, layer))
    return out[:, : q.shape[1]]


def _attention_forward(q, k, v, key_length, layer):
    return jax.vjp(lambda q, k, v: cudnn.attention(q, k, v, key_length, layer), q, k, v)


def _attention_backward(vjp, dout):
    return *vjp(dout), None, None


attention.defvjp(_attention_forward, _attention_backward)


def attention_with_lse(
    q: Array, k: Array, v: Array, key_length: Array | None, layer: Array | None = None
) -> tuple[Array, Array]:
    """Compute attention and its log-sum-exp, float32 [B, Tq, H], by the kernel; has no gradient."""
    queries = q.shape[1]
    out, lse = _call(q, k, v, key_length, layer)
    return out[:, :queries], lse[:, :, :queries].swapaxes(1, 2)


def _call(
    q: Array, k: Array, v: Array, key_length: Array | None, layer: Array | None
) -> tuple[Array, Array]:
    """Return output and log-sum-exp of padded queries."""
    batch, keys = q.shape[0], k.shape[-3]
    first_row = jnp.zeros((), jnp.int32)
    if keys % _TILE_ROWS:
        k, v = of_layer(k, v, layer)  # padding would copy the whole stack
    elif layer is not None:
        k, v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
        first_row = layer.astype(jnp.int32) * batch
    scalars = jnp.append(visible(key_length, batch, keys), first_row)
    q, k, v = (padded(x, _TILE_ROWS) for x in (q, k, v))
    return _kernel(q, k, v, scalars)


# Jitted, so that a program lowers it once: kernels that are lowered twice have two names, and XLA
# does not merge two calls on the same arrays.
@jax.jit
def _kernel(q: Array, k: Array, v: Array, scalars: Array) -> tuple[Array, Array]:
    """Call the kernel; scalars, int32 [B + 1], are visible keys and the first row of k and v."""
    batch, queries, heads, dim = q.shape
    tiles = pl.cdiv(queries, _QUERIES)

    def body(q_ref, k_ref, v_ref, scalars_ref, out_ref, lse_ref, shared):
        row, head, tile = (lax.axis_index(name) for name in ("row", "head", "tile"))
        warpgroup = lax.axis_index("warpgroup")
        length, key_row = scalars_ref[row], scalars_ref[batch] + row
        key_tiles = jnp.maximum(lax.div(length + (_KEYS - 1), _KEYS), 1)

        @pl.when(warpgroup == _WARPGROUPS)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            _copy_keys(k_ref.at[key_row, :, head], v_ref.at[key_row, :, head], key_tiles, shared)

        @pl.when(warpgroup < _WARPGROUPS)
        def _():
            plgpu.set_max_registers(232, action="increase")
            rows = pl.ds((tile * _WARPGROUPS + warpgroup) * _ROWS, _ROWS)
            mine, ready = shared.q.at[warpgroup], shared.q_ready.at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[row, rows, head], mine, ready)
            plgpu.barrier_wait(ready)
            out, highest, total = _attend(mine, length, key_tiles, shared)
            mine[...] = out.astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out_ref.at[row, rows, head])
            lse = highest * math.log(2) + jnp.log(total)
            lse_ref[row, head, rows] = jnp.where(length > 0, lse, -jnp.inf)
            plgpu.wait_smem_to_gmem(0)

    results = (
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((batch, heads, tiles * _QUERIES), jnp.float32),
    )
    found: Any = plgpu.kernel(
        body,
        out_type=results,
        # The last axis runs fastest: CTAs of one head run together and share its keys in the cache.
        grid=(batch, heads, tiles),
        grid_names=("row", "head", "tile"),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=[_shared(dim, q.dtype)],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(q, k, v, scalars)
    return found


def _shared(dim: int, dtype: Any) -> _Shared:
    wgmma_tiles = (
        plgpu.TilingTransform((_TILE_ROWS, 64)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )
    matrices: Any = lambda *shape: plgpu.SMEM((*shape, dim), dtype, transforms=wgmma_tiles)
    ready = plgpu.Barrier(num_barriers=_STAGES)
    free = plgpu.Barrier(num_barriers=_STAGES, num_arrivals=_WARPGROUPS)
    return _Shared(
        matrices(_WARPGROUPS, _ROWS),
        matrices(_STAGES, _KEYS),
        matrices(_STAGES, _KEYS),
        plgpu.Barrier(num_barriers=_WARPGROUPS),
        ready, ready, free, free,
    )  # fmt: skip


def _copy_keys(k_ref: Any, v_ref: Any, tiles: Array, shared: _Shared) -> None:
    """Copy the tiles of keys and values [T, D], the last one first."""

    def step(i, _):
        slot = lax.rem(i, _STAGES)
        rows = pl.ds((tiles - 1 - i) * _KEYS, _KEYS)
        for source, target, free, ready in (
            (k_ref, shared.k, shared.k_free, shared.k_ready),
            (v_ref, shared.v, shared.v_free, shared.v_ready),
        ):
            pl.when(i >= _STAGES)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            plgpu.copy_gmem_to_smem(source.at[rows], target.at[slot], ready.at[slot])

    lax.fori_loop(0, tiles, step, None)


def _attend(
    q_smem: Any, length: Array, tiles: Array, shared: _Shared
) -> tuple[Array, Array, Array]:
    """Return float32 output [64, D] of 64 queries; the softmax's maximum (base 2), and its sum."""
    dim = q_smem.shape[1]

    def first():
        plgpu.barrier_wait(shared.k_ready.at[0])
        scores = _add_product(_filled((_ROWS, _KEYS), 0), q_smem, shared.k.at[0].T)
        plgpu.barrier_arrive(shared.k_free.at[0])
        key = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        scores = jnp.where(key < length - (tiles - 1) * _KEYS, scores, _HIDDEN)
        # Without a visible key all weights are zero; below a maximum of hidden scores they would be
        # powers of its rounding error.
        highest = jnp.where(length > 0, _HIDDEN, 0.0)
        return _weights(scores, _filled((_ROWS,), highest), dim, q_smem.dtype)

    def step(i, carry):
        """Multiply the scores of tile i and the values of tile i - 1 together."""
        out, highest, total, weights = carry
        now, before = lax.rem(i, _STAGES), lax.rem(i - 1, _STAGES)
        plgpu.barrier_wait(shared.k_ready.at[now])
        plgpu.barrier_wait(shared.v_ready.at[before])

        def products(refs):
            scores_ref, out_ref, *softmax_refs = refs
            highest_ref, _, weights_ref = softmax_refs
            plgpu.wgmma(scores_ref, q_smem, shared.k.at[now].T)
            plgpu.wgmma(out_ref, weights_ref[...], shared.v.at[before])
            scores = plgpu.wgmma_accumulator_load(scores_ref, wait_n=1)
            plgpu.barrier_arrive(shared.k_free.at[now])
            found = _weights(scores, highest_ref[...], dim, q_smem.dtype)
            for ref, x in zip(softmax_refs, found, strict=True):
                ref[...] = x

        accumulators = _accumulator(_filled((_ROWS, _KEYS), 0)), _accumulator(out)
        state: Any = (*accumulators, highest, total, weights)
        _, out, new_highest, added, weights = pl.run_state(products)(state)
        plgpu.barrier_arrive(shared.v_free.at[before])
        decay = jnp.exp2(highest - new_highest)
        return out * _across(decay, dim), new_highest, total * decay + added, weights

    carry = (_filled((_ROWS, dim), 0), *first())
    out, highest, total, weights = lax.fori_loop(1, tiles, step, carry)
    last = lax.rem(tiles - 1, _STAGES)
    plgpu.barrier_wait(shared.v_ready.at[last])
    out = _add_product(out, weights, shared.v.at[last])
    return out * _across(jnp.where(length > 0, 1 / total, 0.0), dim), highest, total


def _weights(scores: Array, highest: Array, dim: int, dtype: Any) -> tuple[Array, Array, Array]:
    """Return each row's new maximum and sum of weights, and the weights, of a tile of scores.

    Weights are powers of two, which the hardware computes; maxima are in the same scale.
    """
    scale = math.log2(math.e) / math.sqrt(dim)
    highest = jnp.maximum(highest, scores.max(axis=1) * scale)
    weights = jnp.exp2(scores * scale - _across(highest, _KEYS))
    return highest, weights.sum(axis=1), weights.astype(dtype)


_accumulator = plgpu.WGMMAAccumulatorRef.init


def _add_product(out: Array, a: Any, b: Any) -> Array:
    result: Any = pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(_accumulator(out))
    return result


def _filled(shape: tuple[int, ...], value: float | Array) -> Array:
    layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _across(x: Array, columns: int) -> Array:
    return lax.broadcast_in_dim(x, (_ROWS, columns), (0,))
