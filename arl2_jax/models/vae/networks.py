"""Encoder and decoder of the video autoencoder, for a few frames at a time."""

import itertools

import jax.numpy as jnp
from flax import nnx

from arl2_jax.config import VAEConfig
from arl2_jax.models.vae.layers import (
    NORM_EPS,
    AttentionBlock,
    CausalConv,
    Chain,
    Downsample,
    ResidualBlock,
    Upsample,
    activate,
)
from arl2_jax.nn.norm import RMSNorm


class Encoder(nnx.Module):
    """Pixels to normalised latents, the mean of the distribution of Wan's encoder."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        dims = [cfg.dim * factor for factor in (1, *cfg.dim_mult)]
        self.conv_in = CausalConv(3, dims[0], dtype, rngs=rngs)
        layers = []
        for level, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
            layers += _residual_blocks(in_dim, out_dim, cfg.num_res_blocks, dtype, rngs=rngs)
            if level < len(cfg.temporal_downsample):
                temporal = cfg.temporal_downsample[level]
                layers.append(Downsample(out_dim, temporal, dtype, rngs=rngs))
        self.downsamples = Chain(layers)
        self.middle = _middle(dims[-1], dtype, rngs=rngs)
        self.norm_out = RMSNorm(dims[-1], NORM_EPS, rngs=rngs)
        self.conv_out = CausalConv(dims[-1], 2 * cfg.z_dim, dtype, rngs=rngs)
        self.quant_conv = _latent_conv(2 * cfg.z_dim, rngs=rngs)
        self.cfg = cfg

    def __call__(self, pixels, state, first: bool):
        """Encode pixels [B, 1 or temporal_factor, H, W, 3] as one latent frame [B, 1, h, w, z]."""
        before, down, middle, after = state
        x, before = self.conv_in(pixels, before)
        x, down = self.downsamples(x, down, first)
        x, middle = self.middle(x, middle, first)
        x, after = self.conv_out(activate(self.norm_out, x), after)
        mean, _ = jnp.split(self.quant_conv(x.astype(jnp.float32)), 2, axis=-1)
        latents_mean, std = _statistics(self.cfg)
        return (mean - latents_mean) / std, (before, down, middle, after)

    def init_state(self, batch: int, rows: int, columns: int):
        """Return the state before the first frame of `rows` x `columns` pixels."""
        before = self.conv_in.init_state(batch, rows, columns)
        down, size = self.downsamples.init_state(batch, rows, columns)
        middle, size = self.middle.init_state(batch, *size)
        return before, down, middle, self.conv_out.init_state(batch, *size)


class Decoder(nnx.Module):
    """Normalised latents to pixels."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        dims = [cfg.dim * factor for factor in cfg.dim_mult[::-1]]
        self.post_quant_conv = _latent_conv(cfg.z_dim, rngs=rngs)
        self.conv_in = CausalConv(cfg.z_dim, dims[0], dtype, rngs=rngs)
        self.middle = _middle(dims[0], dtype, rngs=rngs)
        layers, in_dim = [], dims[0]
        for level, out_dim in enumerate(dims):
            layers += _residual_blocks(in_dim, out_dim, cfg.num_res_blocks + 1, dtype, rngs=rngs)
            if level < len(cfg.temporal_downsample):
                temporal = cfg.temporal_downsample[::-1][level]
                layers.append(Upsample(out_dim, temporal, dtype, rngs=rngs))
            in_dim = out_dim // 2
        self.upsamples = Chain(layers)
        self.norm_out = RMSNorm(dims[-1], NORM_EPS, rngs=rngs)
        self.conv_out = CausalConv(dims[-1], 3, dtype, rngs=rngs)
        self.cfg = cfg

    def __call__(self, latent, state, first: bool):
        """Decode a latent frame [B, 1, h, w, z] to pixels [B, 1 or temporal_factor, H, W, 3]."""
        latents_mean, std = _statistics(self.cfg)
        x = self.post_quant_conv(latent.astype(jnp.float32) * std + latents_mean)
        before, middle, up, after = state
        x, before = self.conv_in(x, before)
        x, middle = self.middle(x, middle, first)
        x, up = self.upsamples(x, up, first)
        x, after = self.conv_out(activate(self.norm_out, x), after)
        return jnp.clip(x.astype(jnp.float32), -1, 1), (before, middle, up, after)

    def init_state(self, batch: int, rows: int, columns: int):
        """Return the state before the first frame of `rows` x `columns` latents."""
        before = self.conv_in.init_state(batch, rows, columns)
        middle, size = self.middle.init_state(batch, rows, columns)
        up, size = self.upsamples.init_state(batch, *size)
        return before, middle, up, self.conv_out.init_state(batch, *size)


def _residual_blocks(in_dim: int, out_dim: int, count: int, dtype, *, rngs: nnx.Rngs):
    widths = [in_dim] + count * [out_dim]
    return [ResidualBlock(widths[i], out_dim, dtype, rngs=rngs) for i in range(count)]


def _middle(dim: int, dtype, *, rngs: nnx.Rngs) -> Chain:
    first, last = _residual_blocks(dim, dim, 2, dtype, rngs=rngs)
    return Chain([first, AttentionBlock(dim, dtype, rngs=rngs), last])


def _statistics(cfg: VAEConfig):
    """Return mean and standard deviation of each channel of the latents."""
    values = (cfg.latents_mean, cfg.latents_std)
    return tuple(jnp.asarray(value, jnp.float32) for value in values)


def _latent_conv(dim: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Make the 1 x 1 x 1 convolution next to the latents, in full float32 on any device."""
    return nnx.Linear(dim, dim, precision="highest", rngs=rngs)
