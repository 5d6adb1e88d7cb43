"""Small random Wan networks of Diffusers, and their inputs in both forms."""

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from arl2_jax.config import ModelConfig


def random_wan(cfg: ModelConfig, seed=0) -> WanTransformer3DModel:
    """Diffusers' network of these sizes; nothing in it is zero, one or alike in all layers."""
    network = WanTransformer3DModel(
        patch_size=cfg.patch_size,
        num_attention_heads=cfg.num_heads,
        attention_head_dim=cfg.head_dim,
        in_channels=cfg.in_dim,
        out_channels=cfg.out_dim,
        text_dim=cfg.text_dim,
        freq_dim=cfg.freq_dim,
        ffn_dim=cfg.ffn_dim,
        num_layers=cfg.num_layers,
        eps=cfg.eps,
    )
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            size = p[0].numel() ** -0.5 if p.ndim in (2, 5) else 0.3
            p.copy_(size * noise + (p.ndim == 1 and "norm" in name and "weight" in name))
    return network.eval()


def tensors_of(network) -> dict[str, np.ndarray]:
    """The weights of a torch module, by name."""
    return {name: x.detach().numpy() for name, x in network.state_dict().items()}


def channels_first(latents) -> torch.Tensor:
    """[B, F, rows, columns, C] -> [B, C, F, rows, columns]."""
    return torch.from_numpy(np.array(latents)).permute(0, 4, 1, 2, 3)


def channels_last(video: torch.Tensor) -> np.ndarray:
    """[B, C, F, rows, columns] -> [B, F, rows, columns, C]."""
    return video.detach().permute(0, 2, 3, 4, 1).numpy()


def per_token(timestep, tokens: int) -> torch.Tensor:
    """Timesteps of frames [B, F] as timesteps of tokens [B, F * tokens]."""
    return torch.from_numpy(np.repeat(np.asarray(timestep), tokens, axis=1))


def random_inputs(cfg, *, frames, rows, columns, batch=2, words=3, seed=0):
    """Latents, timesteps and text; rows and columns count tokens, text is zero past `words`."""
    rng = np.random.default_rng(seed)
    _, ph, pw = cfg.patch_size
    latents = rng.standard_normal((batch, frames, rows * ph, columns * pw, cfg.in_dim))
    timestep = rng.uniform(0, 1000, (batch, frames))
    text = rng.standard_normal((batch, cfg.text_len, cfg.text_dim))
    text[:, words:] = 0
    return tuple(jnp.asarray(x, jnp.float32) for x in (latents, timestep, text))


class MaskedSelfAttention(WanAttnProcessor):
    """Wan's attention with a mask on the video's tokens; text stays unmasked."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, x, text=None, mask=None, rotary_emb=None):
        mask = mask if rotary_emb is None else self.mask
        return super().__call__(attn, x, text, mask, rotary_emb)
