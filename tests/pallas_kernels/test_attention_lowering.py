"""Programs of the GPU kernels of softmax attention, lowered without a GPU."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import cudnn, gpu, lse


@pytest.mark.parametrize(
    ("queries", "keys", "dim", "length"), [(4680, 4680, 128, None), (63, 65, 64, [7, 65])]
)
def test_the_hopper_kernel_lowers_anywhere(queries, keys, dim, length):
    inputs = [jax.ShapeDtypeStruct((2, n, 3, dim), jnp.bfloat16) for n in (queries, keys, keys)]
    length = None if length is None else jnp.asarray(length)
    traced = jax.jit(lambda *x: gpu.attention(*x, length)).trace(*inputs)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("call", [gpu.attention, gpu.attention_with_lse])
@pytest.mark.parametrize(("queries", "keys", "dim"), [(4680, 4680, 128), (63, 64, 64)])
def test_the_hopper_kernel_reads_layers_in_place(queries, keys, dim, call):
    """All layers reach the kernel, and no slice of them is made; lse goes to whole tiles."""
    sizes = [(2, queries, 3, dim), *[(5, 2, keys, 3, dim)] * 2]
    inputs = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.jit(lambda q, k, v, i: call(q, k, v, None, i)).trace(*inputs, scalar)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (kernel,) = (line for line in text.splitlines() if "@mosaic_gpu" in line)
    *_, signature = kernel.split(" : (")
    assert signature.count(f"tensor<10x{keys}x3x{dim}xbf16>") == 2
    assert "dynamic_slice" not in text
    if call is gpu.attention_with_lse:
        assert f"tensor<2x3x{-(-queries // 128) * 128}xf32>" in signature
        assert [x.shape for x in traced.out_info] == [sizes[0], sizes[0][:3]]


def test_two_calls_of_the_hopper_kernel_are_one_to_xla():
    """Wherever they stand in a program: a layer and its teacher attend to the same block."""

    def both(q, k, v, w):
        out, lse = gpu.attention_with_lse(q, k, v, None)
        loss = lambda w: jnp.sum((gpu.attention(q, k, v, None) * w).astype(jnp.float32))
        return out, lse, jax.value_and_grad(loss)(w)

    inputs = [jax.ShapeDtypeStruct((2, 128, 3, 64), jnp.bfloat16)] * 4
    text = jax.jit(both).trace(*inputs).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("call @_kernel(") == 2
    assert len([line for line in text.splitlines() if "@mosaic_gpu" in line]) == 1


def test_the_hopper_kernel_slices_layers_that_it_pads():
    """Numbers of keys that are no multiple of 8 cost a copy of one layer, not of all."""
    sizes = [(2, 63, 3, 64), *[(5, 2, 65, 3, 64)] * 2]
    inputs = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    traced = jax.jit(lambda q, k, v, i: gpu.attention(q, k, v, None, i)).trace(*inputs, 3)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "tensor<2x72x3x64xbf16>" in text and "x72x3x64xbf16> -> tensor<5" not in text


@pytest.fixture
def cudnn_at_hand(monkeypatch):
    """Lets calls of cuDNN be traced where it is not."""
    fused = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)


@pytest.mark.parametrize("length", [None, [7, 65]])
def test_lse_of_cudnn_lowers_anywhere(length, cudnn_at_hand):
    """JAX has it in float32 under a private name: that name and its options are there."""
    inputs = [jax.ShapeDtypeStruct((2, n, 3, 64), jnp.bfloat16) for n in (63, 65, 65)]
    length = None if length is None else jnp.asarray(length)
    call = lambda q, k, v: cudnn.attention_with_lse(q, k, v, length)
    traced = jax.jit(call).trace(*inputs)
    shapes = [(x.shape, x.dtype) for x in traced.out_info]
    assert shapes == [((2, 63, 3, 64), jnp.bfloat16), ((2, 63, 3), jnp.float32)]
    assert "fmhaSoftmax" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("keys", [64, 65])
@pytest.mark.parametrize("backend", [cudnn, gpu])
def test_gradients_for_a_layer_lower_anywhere(backend, keys, return_lse, cudnn_at_hand):
    sizes = [(2, 63, 3, 64), *[(5, 2, keys, 3, 64)] * 2]
    inputs = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]

    def loss(q, k, v, length, layer):
        if not return_lse:
            return backend.attention(q, k, v, length, layer).astype(jnp.float32).sum()
        out, sums = lse.with_lse(backend.attention_with_lse, q, k, v, length, layer)
        return out.astype(jnp.float32).sum() + sums.sum()

    scalars = jax.ShapeDtypeStruct((2,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(*inputs, *scalars)
    assert [x.shape for x in traced.out_info] == sizes
    assert traced.lower(lowering_platforms=("cuda",)).as_text()
