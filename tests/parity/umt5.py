"""Transformers' UMT5 encoder with given weights, and Wan's use of it."""

from collections.abc import Mapping

import numpy as np
import torch
import transformers

from arl2_jax.config import UMT5Config


def umt5_of(cfg: UMT5Config, tensors: Mapping[str, np.ndarray]) -> transformers.UMT5EncoderModel:
    """The network in float32 around tensors under its own names."""
    config = transformers.UMT5Config(
        vocab_size=cfg.vocab_size,
        d_model=cfg.dim,
        d_kv=cfg.head_dim,
        d_ff=cfg.ffn_dim,
        num_layers=cfg.num_layers,
        num_heads=cfg.num_heads,
        relative_attention_num_buckets=cfg.num_buckets,
        relative_attention_max_distance=cfg.max_distance,
        layer_norm_epsilon=cfg.eps,
        feed_forward_proj="gated-gelu",
    )
    network = transformers.UMT5EncoderModel(config).eval()
    state = {name: torch.tensor(x) for name, x in tensors.items()}
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert set(missing) <= {"encoder.embed_tokens.weight"} and not unexpected
    return network


@torch.no_grad()
def encode(network, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Embeddings with the padding masked, and zeros past each length: float32 [B, L, dim]."""
    mask = np.arange(tokens.shape[1]) < lengths[:, None]
    ids, seen = torch.tensor(tokens, dtype=torch.long), torch.tensor(mask, dtype=torch.long)
    return network(ids, attention_mask=seen).last_hidden_state.numpy() * mask[..., None]
