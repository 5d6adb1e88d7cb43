"""The video autoencoder on whole clips and on runs of frames: scans over single latent frames.

A clip and a stream of its frames give the same numbers. Memory for features does not grow with the
length.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from arl2_jax.config import VAEConfig
from arl2_jax.models.vae.frames import (
    Params,
    State,
    check_latents,
    check_pixels,
    decode_frame,
    encode_frame,
    init_decoder_state,
    init_encoder_state,
)
from arl2_jax.models.vae.tiling import over_tiles


def encode(
    params: Params,
    cfg: VAEConfig,
    pixels: Float[Array, "b frames height width 3"],
    *,
    tile: tuple[int, int] | None = None,
) -> Float[Array, "b t rows columns channels"]:
    """Encode whole clips.

    Args:
      params: parameters, from `init_vae` or `load_vae`.
      cfg: autoencoder.
      pixels: in [-1, 1]; F = 1 + k * cfg.temporal_factor.
      tile: rows and columns of latents that are computed together, at least 2 x 2, to save memory;
        `None` computes whole frames.

    Returns:
      Latents (float32), the mean of the encoder's distribution, normalised; T = 1 + k.

    Raises:
      ValueError: the pixels' shape or the tile does not fit.
    """
    check_pixels(cfg, pixels)
    if (pixels.shape[1] - 1) % cfg.temporal_factor:
        raise ValueError(
            f"pixels have {pixels.shape[1]} frames, not 1 + a multiple of {cfg.temporal_factor}; "
            f"drop {(pixels.shape[1] - 1) % cfg.temporal_factor} of them"
        )

    def step(pixels, state, first):
        latent, state = encode_frame(params, cfg, pixels, state, first=first)
        return latent[:, None], state

    def whole(pixels):
        rows, columns = (size // cfg.spatial_factor for size in pixels.shape[2:4])
        state = init_encoder_state(cfg, pixels.shape[0], rows, columns)
        return _scan_frames(step, pixels, state, cfg.temporal_factor, first=True)[0]

    if tile is None:
        return whole(pixels)
    compute = lambda part, state: (whole(part), state)
    return over_tiles(compute, pixels, (), tile, source=cfg.spatial_factor)[0]


def decode(
    params: Params,
    cfg: VAEConfig,
    latents: Float[Array, "b t rows columns channels"],
    *,
    tile: tuple[int, int] | None = None,
) -> Float[Array, "b frames height width 3"]:
    """Decode whole clips.

    Args:
      params, cfg, tile: as in `encode`.
      latents: normalised.

    Returns:
      Pixels (float32, in [-1, 1]); F = 1 + (T - 1) * cfg.temporal_factor.

    Raises:
      ValueError: the latents' shape or the tile does not fit.
    """
    check_latents(cfg, latents)

    def whole(latents):
        state = init_decoder_state(cfg, latents.shape[0], *latents.shape[2:4])
        return decode_block(params, cfg, latents, state, first=True)[0]

    if tile is None:
        return whole(latents)
    # Tile by tile, each through the whole clip: only one tile's state is in memory at a time.
    compute = lambda part, state: (whole(part), state)
    return over_tiles(compute, latents, (), tile, target=cfg.spatial_factor)[0]


def decode_block(
    params: Params,
    cfg: VAEConfig,
    latents: Float[Array, "b f rows columns channels"],
    state: State,
    *,
    first: bool,
    tile: tuple[int, int] | None = None,
) -> tuple[Float[Array, "b frames height width 3"], State]:
    """Decode a run of latent frames; consecutive runs give the same pixels as `decode`.

    Args:
      params, cfg, tile: as in `decode`.
      latents: normalised.
      state: from `init_decoder_state` with the same tile, or the previous run.
      first: whether a video begins with this run.

    Returns:
      Pixels, and the state for the next run.

    Raises:
      ValueError: the latents' shape does not fit, or the state is of another shape.
    """
    check_latents(cfg, latents)

    def step(latents, state, first):
        return decode_frame(params, cfg, latents[:, 0], state, first=first)

    compute = lambda part, state: _scan_frames(step, part, state, 1, first=first)
    if tile is None:
        return compute(latents, state)
    return over_tiles(compute, latents, state, tile, target=cfg.spatial_factor)


def _scan_frames(step: Callable, x, state: State, length: int, *, first: bool):
    """Scan `step` over runs of `length` frames; `first` runs the first frame of a video alone."""
    outputs = []
    if first:
        y, state = step(x[:, :1], state, True)
        outputs.append(y)
        x = x[:, 1:]
    if x.shape[1]:
        later = lambda state, frames: step(frames, state, False)[::-1]
        runs = rearrange(x, "b (k n) h w c -> k b n h w c", n=length)
        state, ys = jax.lax.scan(later, state, runs)
        outputs.append(rearrange(ys, "k b n h w c -> b (k n) h w c"))
    return jnp.concatenate(outputs, axis=1), state
