"""The video autoencoder as functions of parameters, one latent frame at a time.

Parameters are a nested dict {"encoder": ..., "decoder": ...} whose paths follow Wan's names
(`decoder/upsamples/0/conv1/kernel`).

Convolutions and attention compute in `cfg.dtype`, and so are the features between layers. Norms
with their SiLU, the 1 x 1 x 1 convolutions next to the latents, and latents and pixels are float32.
`jax.default_matmul_precision` sets the precision of float32 products.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from arl2_jax.config import VAEConfig
from arl2_jax.models.vae.networks import Decoder, Encoder
from arl2_jax.models.vae.tiling import make_grid

Params = dict[str, Any]
# What a network keeps of earlier frames: a pytree of arrays in cfg.dtype.
State = Any
Network = type[Encoder] | type[Decoder]


def init_vae(cfg: VAEConfig, key: Array) -> Params:
    """Return random parameters, a nested dict with string keys, in the dtypes of `vae_shapes`.

    Kernels are uniform with variance 1 / inputs, scales are one and biases zero.
    """
    return _init(cfg, key)


@functools.partial(jax.jit, static_argnums=0)
def _init(cfg: VAEConfig, key: Array) -> Params:
    leaves, tree = jax.tree_util.tree_flatten_with_path(vae_shapes(cfg))
    # One draw for all: compiling a generator for every kernel takes many seconds.
    ends = np.cumsum([leaf.size for _, leaf in leaves])
    noise = jax.random.uniform(key, (int(ends[-1]),), minval=-1, maxval=1)
    parts = jnp.split(noise, ends[:-1])
    filled = [_fill(path[-1].key, leaf, x) for (path, leaf), x in zip(leaves, parts, strict=True)]
    return jax.tree.unflatten(tree, filled)


def _fill(name: str, leaf: jax.ShapeDtypeStruct, noise: Array) -> Array:
    if name != "kernel":
        return jnp.full(leaf.shape, name == "scale", leaf.dtype)
    limit = (3 * leaf.shape[-1] / leaf.size) ** 0.5
    return (limit * noise).reshape(leaf.shape).astype(leaf.dtype)


def vae_shapes(cfg: VAEConfig) -> Params:
    """Return shapes and dtypes of the parameters without creating arrays.

    Parameters that compute in `cfg.dtype` have that type, the rest are float32.
    """
    return jax.eval_shape(
        lambda: {
            name: nnx.to_pure_dict(nnx.split(network(cfg, rngs=nnx.Rngs(0)))[1])
            for name, network in (("encoder", Encoder), ("decoder", Decoder))
        }
    )


@functools.lru_cache
def _graph(network: Network, cfg: VAEConfig) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: network(cfg, rngs=nnx.Rngs(0))))[0]


def init_encoder_state(cfg: VAEConfig, batch: int, rows: int, columns: int) -> State:
    """Return the encoder's state before the first frame.

    Args:
      cfg: autoencoder.
      batch: videos encoded together.
      rows, columns: size in latents; pixels are `cfg.spatial_factor` times as many.
    """
    factor = cfg.spatial_factor
    return _init_state(Encoder, cfg, batch, rows * factor, columns * factor)


def init_decoder_state(
    cfg: VAEConfig, batch: int, rows: int, columns: int, *, tile: tuple[int, int] | None = None
) -> State:
    """Return the decoder's state before the first frame.

    Args:
      cfg: autoencoder.
      batch: videos decoded together.
      rows, columns: size in latents.
      tile: as in `decode_block`; then there is a state for each tile, along a leading axis.
    """
    if tile is None:
        return _init_state(Decoder, cfg, batch, rows, columns)
    down, across = make_grid(rows, columns, tile)
    one = _init_state(Decoder, cfg, batch, down.size, across.size)
    count = len(down.starts) * len(across.starts)
    return jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), one)


def encode_frame(
    params: Params,
    cfg: VAEConfig,
    pixels: Float[Array, "b frames height width 3"],
    state: State,
    *,
    first: bool,
) -> tuple[Float[Array, "b rows columns channels"], State]:
    """Encode the pixel frames of one latent frame.

    Args:
      params: parameters, from `init_vae` or `load_vae`.
      cfg: autoencoder.
      pixels: in [-1, 1]; one frame if it is the first, else `cfg.temporal_factor` frames.
      state: from `init_encoder_state` or the previous frame.
      first: whether it is the first frame of a video.

    Returns:
      The latent frame (float32, normalised), and the state for the next one.

    Raises:
      ValueError: the pixels' shape does not fit, or the state is of another shape.
    """
    check_pixels(cfg, pixels)
    wanted = 1 if first else cfg.temporal_factor
    if pixels.shape[1] != wanted:
        raise ValueError(
            f"pixels have {pixels.shape[1]} frames; with first={first} a latent frame is made of "
            f"{wanted}"
        )
    batch, _, rows, columns, _ = pixels.shape
    _check_state(state, Encoder, cfg, batch, rows, columns)
    encoder = nnx.merge(_graph(Encoder, cfg), params["encoder"])
    latents, state = encoder(pixels, state, first)
    return latents[:, 0], state


def decode_frame(
    params: Params,
    cfg: VAEConfig,
    latent: Float[Array, "b rows columns channels"],
    state: State,
    *,
    first: bool,
) -> tuple[Float[Array, "b frames height width 3"], State]:
    """Decode one latent frame.

    Args:
      params: parameters, from `init_vae` or `load_vae`.
      cfg: autoencoder.
      latent: normalised.
      state: from `init_decoder_state` or the previous frame.
      first: whether it is the first frame of a video.

    Returns:
      Pixels (float32, in [-1, 1]), one frame if `first`, else `cfg.temporal_factor` frames; and
      the state for the next frame.

    Raises:
      ValueError: the latents' shape does not fit, or the state is of another shape.
    """
    latents = latent[:, None]
    check_latents(cfg, latents)
    batch, _, rows, columns, _ = latents.shape
    _check_state(state, Decoder, cfg, batch, rows, columns)
    decoder = nnx.merge(_graph(Decoder, cfg), params["decoder"])
    return decoder(latents, state, first)


def check_pixels(cfg: VAEConfig, pixels) -> None:
    """Raise ValueError unless pixels are [B, F, H, W, 3] in whole latents."""
    if pixels.ndim != 5 or pixels.shape[-1] != 3:
        raise ValueError(
            f"pixels have shape {pixels.shape}; the encoder takes [batch, frames, rows, columns, 3]"
        )
    factor = cfg.spatial_factor
    if pixels.shape[2] % factor or pixels.shape[3] % factor or not pixels.size:
        raise ValueError(
            f"pixels have {pixels.shape[2]} x {pixels.shape[3]} rows and columns, not multiples of "
            f"{factor}; crop or resize them"
        )


def check_latents(cfg: VAEConfig, latents) -> None:
    """Raise ValueError unless latents are [B, T, h, w, z]."""
    if latents.ndim != 5 or latents.shape[-1] != cfg.z_dim or not latents.size:
        raise ValueError(
            f"latents have shape {latents.shape}; the decoder takes [batch, frames, rows, columns, "
            f"vae.z_dim={cfg.z_dim}]; name latents of this autoencoder"
        )


def _init_state(network: Network, cfg: VAEConfig, *size: int) -> State:
    shapes = _state_shapes(network, cfg, *size)
    return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)


@functools.lru_cache
def _state_shapes(network: Network, cfg: VAEConfig, *size: int) -> State:
    init = lambda: network(cfg, rngs=nnx.Rngs(0)).init_state(*size)
    return jax.eval_shape(init)


def _check_state(state: State, network: Network, cfg: VAEConfig, *size: int) -> None:
    wanted = _state_shapes(network, cfg, *size)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    if shapes(state) != shapes(wanted):
        raise ValueError(
            f"the state is not one for batch, rows and columns {size} in {cfg.dtype}; start from "
            f"init_{network.__name__.lower()}_state of these sizes"
        )
