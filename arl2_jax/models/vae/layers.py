"""Layers of the video autoencoder, causal in time.

Features are [B, F, H, W, C]. A layer takes features and its state, what it keeps of earlier frames,
and returns new ones of both; states start as zeros.

Source of the architecture: Wan, arXiv 2503.20314, and the public code of Wan2.1.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from arl2_jax.nn.norm import RMSNorm

# Wan divides by the length of the channel vector, but at least by 1e-12.
NORM_EPS = 1e-24
kernel_init = nnx.initializers.lecun_normal()


def activate(norm: RMSNorm, x):
    """Apply norm and SiLU in float32; return them in the dtype of x."""
    return jax.nn.silu(norm(x.astype(jnp.float32))).astype(x.dtype)


def stack_frames(frames, stride: int = 1):
    """Stack three consecutive frames in the channels, at every `stride`-th frame."""
    count = frames.shape[1] - 2
    return jnp.concatenate([frames[:, i : i + count : stride] for i in range(3)], axis=-1)


def pointwise(in_dim: int, out_dim: int, dtype, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Make a 1 x 1 x 1 convolution."""
    return nnx.Linear(in_dim, out_dim, dtype=dtype, param_dtype=dtype, rngs=rngs)


class CausalConv(nnx.Module):
    """3 x 3 x 3 convolution over a frame and the two before it.

    It is computed as one 2D convolution over three frames stacked in the channels, up to 1.4 times
    as fast on accelerators as a 3D convolution. The kernel is [time, row, column, in, out].
    """

    def __init__(self, in_dim: int, out_dim: int, dtype, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (3, 3, 3, in_dim, out_dim), dtype))
        self.bias = nnx.Param(jnp.zeros(out_dim, dtype))
        self.dtype = dtype

    def __call__(self, x, past):
        """Return features and the last two input frames; `past` has the two frames before x."""
        frames = jnp.concatenate([past, x.astype(self.dtype)], axis=1)
        kernel = rearrange(self.kernel[...], "t h w i o -> h w (t i) o").astype(self.dtype)
        y = jax.lax.conv_general_dilated(
            rearrange(stack_frames(frames), "b f h w c -> (b f) h w c"),
            kernel,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = y.reshape(*x.shape[:-1], -1) + self.bias[...].astype(self.dtype)
        return y, frames[:, -2:]

    def init_state(self, batch: int, rows: int, columns: int):
        """Return two zero frames."""
        return jnp.zeros((batch, 2, rows, columns, self.kernel.shape[3]), self.dtype)


class TimeConv(nnx.Module):
    """3 x 1 x 1 convolution over given frames, without padding; kernel [time, in, out]."""

    def __init__(self, in_dim: int, out_dim: int, stride: int, dtype, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (3, in_dim, out_dim), dtype))
        self.bias = nnx.Param(jnp.zeros(out_dim, dtype))
        self.stride, self.dtype = stride, dtype

    def __call__(self, frames):
        """Map [B, F, H, W, in] to [B, (F - 3) / stride + 1, H, W, out]."""
        kernel = rearrange(self.kernel[...], "t i o -> (t i) o").astype(self.dtype)
        return stack_frames(frames, self.stride) @ kernel + self.bias[...].astype(self.dtype)


class ResidualBlock(nnx.Module):
    """Norm, SiLU and causal convolution twice, plus a shortcut."""

    def __init__(self, in_dim: int, out_dim: int, dtype, *, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(in_dim, NORM_EPS, rngs=rngs)
        self.conv1 = CausalConv(in_dim, out_dim, dtype, rngs=rngs)
        self.norm2 = RMSNorm(out_dim, NORM_EPS, rngs=rngs)
        self.conv2 = CausalConv(out_dim, out_dim, dtype, rngs=rngs)
        self.shortcut = None if in_dim == out_dim else pointwise(in_dim, out_dim, dtype, rngs=rngs)

    def __call__(self, x, state, first: bool):
        """Return the block's output and state, the past frames of both convolutions."""
        del first
        h, past1 = self.conv1(activate(self.norm1, x), state[0])
        h, past2 = self.conv2(activate(self.norm2, h), state[1])
        return h + (x if self.shortcut is None else self.shortcut(x)), (past1, past2)

    def init_state(self, batch: int, rows: int, columns: int):
        """Return the state before the first frame, and the size of the output."""
        states = [conv.init_state(batch, rows, columns) for conv in (self.conv1, self.conv2)]
        return tuple(states), (rows, columns)


class AttentionBlock(nnx.Module):
    """Single-head self-attention within each frame; it has no state."""

    def __init__(self, dim: int, dtype, *, rngs: nnx.Rngs):
        self.norm = RMSNorm(dim, NORM_EPS, rngs=rngs)
        self.qkv = pointwise(dim, 3 * dim, dtype, rngs=rngs)
        self.proj = pointwise(dim, dim, dtype, rngs=rngs)

    def __call__(self, x, state, first: bool):
        """Return the features plus the output of attention."""
        del first
        tokens = rearrange(self.norm(x), "b f h w c -> (b f) (h w) 1 c")
        q, k, v = jnp.split(self.qkv(tokens), 3, axis=-1)
        mixed = jax.nn.dot_product_attention(q, k, v)
        return x + self.proj(mixed).reshape(x.shape), state

    def init_state(self, batch: int, rows: int, columns: int):
        """Return no state, and the unchanged size."""
        return (), (rows, columns)


class Downsample(nnx.Module):
    """Halves rows and columns and, if temporal, the frames; the very first frame stays one."""

    def __init__(self, dim: int, temporal: bool, dtype, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            dim,
            dim,
            (3, 3),
            strides=2,
            padding=((0, 1), (0, 1)),  # at the end of rows and columns alone
            dtype=dtype,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.time_conv = TimeConv(dim, dim, 2, dtype, rngs=rngs) if temporal else None

    def __call__(self, x, past, first: bool):
        """Downsample; if temporal, the state is the last frame before the time convolution."""
        x = self.conv(x)
        if self.time_conv is None:
            return x, past
        if first:
            return x, x
        return self.time_conv(jnp.concatenate([past, x], axis=1)), x[:, -1:]

    def init_state(self, batch: int, rows: int, columns: int):
        """Return the state before the first frame, and the size of the output."""
        rows, columns = rows // 2, columns // 2
        if self.time_conv is None:
            return (), (rows, columns)
        shape = (batch, 1, rows, columns, self.conv.out_features)
        return jnp.zeros(shape, self.conv.dtype), (rows, columns)


class Upsample(nnx.Module):
    """Doubles rows and columns and, if temporal, the frames; the very first frame stays one.

    The channels are halved.
    """

    def __init__(self, dim: int, temporal: bool, dtype, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            dim, dim // 2, (3, 3), padding=1, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.time_conv = TimeConv(dim, 2 * dim, 1, dtype, rngs=rngs) if temporal else None

    def __call__(self, x, past, first: bool):
        """Upsample; if temporal, the state is the time convolution's last two frames.

        The first frame skips the time convolution and is not kept in its state.
        """
        if self.time_conv is not None and not first:
            frames = jnp.concatenate([past, x], axis=1)
            x = rearrange(self.time_conv(frames), "b f h w (n c) -> b (f n) h w c", n=2)
            past = frames[:, -2:]
        return self.conv(repeat(x, "b f h w c -> b f (h m) (w n) c", m=2, n=2)), past

    def init_state(self, batch: int, rows: int, columns: int):
        """Return the state before the first frame, and the size of the output."""
        size = (2 * rows, 2 * columns)
        if self.time_conv is None:
            return (), size
        return jnp.zeros((batch, 2, rows, columns, self.conv.in_features), self.conv.dtype), size


class Chain(nnx.Module):
    """A sequence of layers named "0", "1", ...; the state is the tuple of their states."""

    def __init__(self, layers: Sequence[nnx.Module]):
        self.length = len(layers)
        for i, layer in enumerate(layers):
            setattr(self, str(i), layer)

    def __call__(self, x, states, first: bool):
        """Apply all layers in order; `first` marks the very first frame of a video."""
        new = []
        for i, state in enumerate(states):
            x, state = getattr(self, str(i))(x, state, first)
            new.append(state)
        return x, tuple(new)

    def init_state(self, batch: int, rows: int, columns: int):
        """Return the states before the first frame, and the size of the output."""
        states = []
        for i in range(self.length):
            state, (rows, columns) = getattr(self, str(i)).init_state(batch, rows, columns)
            states.append(state)
        return tuple(states), (rows, columns)
