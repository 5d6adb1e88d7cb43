"""The parts of the network outside its layers: embeddings of its inputs, and the head."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from arl2_jax.config import ModelConfig
from arl2_jax.nn.linear import dot_general
from arl2_jax.nn.mlp import MLP, gelu_tanh
from arl2_jax.nn.norm import layer_norm
from arl2_jax.parameters import ParameterFacts, declare

declare(
    {
        "text_embedding/fc1/kernel": ParameterFacts(("fsdp", "tensor")),
        "text_embedding/fc2/kernel": ParameterFacts(("tensor", "fsdp")),
        "text_embedding/fc[12]/bias": ParameterFacts((None,), decay=False),
        "time_embedding/fc1/kernel": ParameterFacts(("fsdp", "tensor"), keep_float32=True),
        "time_embedding/fc2/kernel": ParameterFacts(("tensor", "fsdp"), keep_float32=True),
        "time_embedding/fc[12]/bias": ParameterFacts((None,), decay=False, keep_float32=True),
        "time_projection/kernel": ParameterFacts(("fsdp", None), keep_float32=True),
        "time_projection/bias": ParameterFacts((None,), decay=False, keep_float32=True),
        "(patch_embedding|head/linear)/kernel": ParameterFacts(("fsdp", None)),
        "(patch_embedding|head/linear)/bias": ParameterFacts((None,), decay=False),
    }
)


def timestep_features(
    timestep: Float[Array, "*batch"], width: int
) -> Float[Array, "*batch freq_dim"]:
    """Return the sinusoidal embedding of a timestep in 0..1000, cosines first; float32."""
    half = width // 2
    frequencies = jnp.asarray(10000.0 ** (-np.arange(half) / half), jnp.float32)
    angles = timestep.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def modulate(x, shift, scale):
    """Return x (1 + scale) + shift with one shift and scale per frame.

    Args:
      x: [B, n, C], the tokens of T frames.
      shift, scale: [B, T, C] float32.
    """
    frames = rearrange(x, "b (f n) c -> b f n c", f=shift.shape[1])
    out = frames * (1 + scale[:, :, None]) + shift[:, :, None]
    return out.reshape(x.shape)


class Head(nnx.Module):
    """Modulated norm, and the linear layer from tokens to patches."""

    def __init__(self, cfg: ModelConfig, dtype, *, rngs: nnx.Rngs):
        normal_init = nnx.initializers.normal(cfg.dim**-0.5)
        self.modulation = nnx.Param(normal_init(rngs.params(), (2, cfg.dim)))
        self.norm = layer_norm(cfg.dim, cfg.eps, affine=False, rngs=rngs)
        # Zero: the untrained network predicts zero flow for any input.
        self.linear = nnx.Linear(
            cfg.dim,
            math.prod(cfg.patch_size) * cfg.out_dim,
            kernel_init=nnx.initializers.zeros,
            dtype=dtype,
            dot_general=dot_general,
            rngs=rngs,
        )

    def __call__(self, x, time):
        """Map tokens [B, n, C] and time embedding [B, T, C] to patches [B, n, features]."""
        shift, scale = jnp.moveaxis(self.modulation[...] + time[:, :, None], 2, 0)
        return self.linear(modulate(self.norm(x), shift, scale))


class Stem(nnx.Module):
    """Everything outside the layers: patch, text and time embeddings, and the head."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        dtype, small = jnp.dtype(cfg.dtype), nnx.initializers.normal(0.02)
        self.cfg = cfg
        self.patch_embedding = nnx.Linear(
            math.prod(cfg.patch_size) * cfg.in_dim,
            cfg.dim,
            kernel_init=nnx.initializers.xavier_uniform(),
            dtype=dtype,
            dot_general=dot_general,
            rngs=rngs,
        )
        self.text_embedding = MLP(
            cfg.text_dim, cfg.dim, cfg.dim, gelu_tanh, dtype, rngs=rngs, kernel_init=small
        )
        # Timesteps keep float32: they steer every layer and cost nothing.
        self.time_embedding = MLP(
            cfg.freq_dim, cfg.dim, cfg.dim, jax.nn.silu, jnp.float32, rngs=rngs, kernel_init=small
        )
        self.time_projection = nnx.Linear(
            cfg.dim,
            6 * cfg.dim,
            kernel_init=nnx.initializers.xavier_uniform(),
            dtype=jnp.float32,
            dot_general=dot_general,
            rngs=rngs,
        )
        self.head = Head(cfg, dtype, rngs=rngs)

    def embed_patches(self, latents: Float[Array, "b t rows columns channels"]):
        """Map latents to tokens [B, n, C] in (frame, row, column) order."""
        _, ph, pw = self.cfg.patch_size
        pattern = "b f (r ph) (c pw) d -> b (f r c) (ph pw d)"
        return self.patch_embedding(rearrange(latents, pattern, ph=ph, pw=pw))

    def embed_time(self, timestep: Float[Array, "b t"]):
        """Return time embedding [B, T, C] and layer modulation [B, T, 6, C], float32."""
        time = self.time_embedding(timestep_features(timestep, self.cfg.freq_dim))
        modulation = self.time_projection(jax.nn.silu(time))
        return time, rearrange(modulation, "b f (six c) -> b f six c", six=6)

    def predict_flow(self, x, time, rows: int, columns: int):
        """Map tokens to flow [B, T, rows, columns, out_dim], float32; rows, columns in latents."""
        _, ph, pw = self.cfg.patch_size
        pattern = "b (f r c) (ph pw d) -> b f (r ph) (c pw) d"
        sizes = dict(f=time.shape[1], r=rows // ph, c=columns // pw, ph=ph, pw=pw)
        return rearrange(self.head(x, time), pattern, **sizes).astype(jnp.float32)
