"""Wan2.1's video autoencoder: whole clips, streams of frames, and spatial tiles."""

from arl2_jax.models.vae.clips import decode, decode_block, encode
from arl2_jax.models.vae.frames import (
    decode_frame,
    encode_frame,
    init_decoder_state,
    init_encoder_state,
    init_vae,
    vae_shapes,
)

__all__ = [
    "decode",
    "decode_block",
    "decode_frame",
    "encode",
    "encode_frame",
    "init_decoder_state",
    "init_encoder_state",
    "init_vae",
    "vae_shapes",
]
