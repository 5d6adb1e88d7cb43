"""Small random autoencoders of Diffusers, and their functions on our arrays."""

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from parity.wan import channels_first, channels_last


def diffusers_vae(cfg) -> AutoencoderKLWan:
    """Diffusers' autoencoder of these sizes."""
    return AutoencoderKLWan(
        base_dim=cfg.dim,
        z_dim=cfg.z_dim,
        dim_mult=list(cfg.dim_mult),
        num_res_blocks=cfg.num_res_blocks,
        temperal_downsample=list(cfg.temporal_downsample),
        latents_mean=list(cfg.latents_mean),
        latents_std=list(cfg.latents_std),
    ).eval()


def encode(network, cfg, pixels) -> np.ndarray:
    """Normalised latents of pixels [B, F, H, W, 3]."""
    with torch.no_grad():
        mean = channels_last(network.encode(channels_first(pixels)).latent_dist.mode())
    return (mean - np.float32(cfg.latents_mean)) / np.float32(cfg.latents_std)


def decode(network, cfg, latents) -> np.ndarray:
    """Pixels [B, F, H, W, 3] of normalised latents."""
    latents = latents * np.float32(cfg.latents_std) + np.float32(cfg.latents_mean)
    with torch.no_grad():
        return channels_last(
            network.decode(channels_first(latents).to(network.dtype)).sample.float()
        )
