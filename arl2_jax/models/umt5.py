"""The encoder of UMT5 as functions of parameters: prompts in, Wan's text embeddings out.

Parameters are a nested dict with separate layers (`blocks/0/attn/q/kernel`). The layers run in a
Python loop over one compiled layer: compile time does not grow with depth, and nothing is stacked,
which would need memory for the 5.7e9 parameters of UMT5-XXL twice.

Source: T5, arXiv 1910.10683, in version 1.1 (gated GELU); UMT5, arXiv 2304.09151.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from arl2_jax.config import UMT5Config
from arl2_jax.models.layer import Params
from arl2_jax.nn.mlp import gelu_tanh
from arl2_jax.nn.norm import RMSNorm, rms_norm

AnyArray = Array | np.ndarray

# Full float32 where the default is lower (TPU, tensor cores); bfloat16 is not affected.
_PRECISION = "highest"


class Attention(nnx.Module):
    """Attention to all keys of the prompt, unscaled, with a bias for relative positions."""

    def __init__(self, cfg: UMT5Config, *, rngs: nnx.Rngs):
        width = cfg.num_heads * cfg.head_dim
        self.q = _linear(cfg, cfg.dim, width, (cfg.dim * cfg.head_dim) ** -0.5, rngs)
        self.k = _linear(cfg, cfg.dim, width, cfg.dim**-0.5, rngs)
        self.v = _linear(cfg, cfg.dim, width, cfg.dim**-0.5, rngs)
        self.o = _linear(cfg, width, cfg.dim, width**-0.5, rngs)
        bias = jax.random.normal(rngs.params(), (cfg.num_buckets, cfg.num_heads))
        self.relative_bias = nnx.Param(bias * cfg.dim**-0.5)
        self.cfg = cfg

    def __call__(self, x: Float[Array, "b n c"], visible: Bool[Array, "b n"]):
        """Attend from every token to the visible ones; float32 [B, n, C]."""
        cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
        heads = lambda y: rearrange(y.astype(dtype), "b n (h d) -> b n h d", h=cfg.num_heads)
        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        buckets = relative_buckets(x.shape[1], cfg.num_buckets, cfg.max_distance)
        bias = rearrange(self.relative_bias[...][buckets], "q k h -> h q k")
        scores = _einsum("b q h d, b k h d -> b h q k", q, k) + bias
        scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        out = _einsum("b h q k, b k h d -> b q h d", weights, v)
        return self.o(rearrange(out, "b q h d -> b q (h d)"))


class GatedFFN(nnx.Module):
    """fc2(gelu(gate(x)) * fc1(x)), GELU in its tanh approximation."""

    def __init__(self, cfg: UMT5Config, *, rngs: nnx.Rngs):
        self.gate = _linear(cfg, cfg.dim, cfg.ffn_dim, cfg.dim**-0.5, rngs)
        self.fc1 = _linear(cfg, cfg.dim, cfg.ffn_dim, cfg.dim**-0.5, rngs)
        self.fc2 = _linear(cfg, cfg.ffn_dim, cfg.dim, cfg.ffn_dim**-0.5, rngs)

    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        """Apply the network; the result is float32."""
        return self.fc2(gelu_tanh(self.gate(x)) * self.fc1(x))


class EncoderLayer(nnx.Module):
    """Attention and feed-forward network around a float32 residual stream.

    The stream of a trained T5 reaches values that bfloat16 would round to whole numbers.
    """

    def __init__(self, cfg: UMT5Config, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (RMSNorm(cfg.dim, cfg.eps, rngs=rngs) for _ in range(2))
        self.attn = Attention(cfg, rngs=rngs)
        self.ffn = GatedFFN(cfg, rngs=rngs)

    def __call__(self, x: Float[Array, "b n c"], visible: Bool[Array, "b n"]):
        """Apply the layer to float32 [B, n, C]."""
        x = x + self.attn(self.norm1(x), visible)
        return x + self.ffn(self.norm2(x))


class EncoderStem(nnx.Module):
    """Everything outside the layers: the token table and the last norm."""

    def __init__(self, cfg: UMT5Config, *, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(
            cfg.vocab_size,
            cfg.dim,
            param_dtype=jnp.dtype(cfg.dtype),
            embedding_init=nnx.initializers.normal(1.0),
            rngs=rngs,
        )
        self.norm = RMSNorm(cfg.dim, cfg.eps, rngs=rngs)


def _linear(cfg: UMT5Config, in_dim: int, out_dim: int, std: float, rngs: nnx.Rngs) -> nnx.Linear:
    dtype = jnp.dtype(cfg.dtype)
    return nnx.Linear(
        in_dim,
        out_dim,
        use_bias=False,
        dtype=dtype,
        param_dtype=dtype,
        kernel_init=nnx.initializers.normal(std),
        precision=_PRECISION,
        preferred_element_type=jnp.float32,
        rngs=rngs,
    )


def _einsum(pattern: str, x: Array, y: Array) -> Array:
    return jnp.einsum(pattern, x, y, precision=_PRECISION, preferred_element_type=jnp.float32)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "n n"]:
    """Return the bucket of every pair (query, key) of a sequence, by signed distance.

    The first half of the buckets is for keys that are not after the query, the second for those
    after it. Within a half, the first half are single distances; then bounds grow geometrically to
    `max_distance`, past which all distances share the last bucket.

    Args:
      length: tokens of the sequence.
      num_buckets, max_distance: as in `UMT5Config`.

    Returns:
      int32 [length, length] in 0..num_buckets - 1.
    """
    place = np.arange(length)
    after = place[None, :] - place[:, None]
    distance, half = np.abs(after), num_buckets // 2
    single = half // 2
    growth = np.log(np.maximum(distance, single) / single) / np.log(max_distance / single)
    far = np.minimum(single + (growth * (half - single)).astype(int), half - 1)
    buckets = np.where(distance < single, distance, far) + half * (after > 0)
    return buckets.astype(np.int32)


@functools.lru_cache
def _layer_graph(cfg: UMT5Config) -> nnx.GraphDef:
    return nnx.split(nnx.eval_shape(lambda: EncoderLayer(cfg, rngs=nnx.Rngs(0))))[0]


def init_umt5(cfg: UMT5Config, key: Array) -> Params:
    """Return random parameters: matrices in cfg.dtype, scales and relative biases float32.

    Args:
      cfg: encoder.
      key: random key.

    Returns:
      Nested dict with string keys: token_embedding, blocks/0, blocks/1, ..., norm.
    """
    stem_key, *layer_keys = jax.random.split(key, cfg.num_layers + 1)
    layers = {str(i): _init(EncoderLayer, cfg, k) for i, k in enumerate(layer_keys)}
    return _init(EncoderStem, cfg, stem_key) | {"blocks": layers}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(kind: type[EncoderStem] | type[EncoderLayer], cfg: UMT5Config, key: Array) -> Params:
    return nnx.to_pure_dict(nnx.split(kind(cfg, rngs=nnx.Rngs(key)))[1])


def umt5_shapes(cfg: UMT5Config) -> Params:
    """Return shapes and dtypes of `init_umt5` without creating arrays."""
    return jax.eval_shape(functools.partial(init_umt5, cfg), jax.random.key(0))


def encode_tokens(
    params: Params, cfg: UMT5Config, tokens: Int[AnyArray, "b l"], lengths: Int[AnyArray, "b"]
) -> Float[Array, "b l text_dim"]:
    """Return text embeddings of tokenised prompts; tokens past a length have no influence.

    Call it outside `jax.jit`, which would compile every layer separately.

    Args:
      params: parameters of `init_umt5`, on a device, or numpy arrays in host memory: then one layer
        at a time is on the device.
      cfg: encoder.
      tokens: token ids, int32, below cfg.vocab_size.
      lengths: tokens of each prompt, its end mark included, int32, at least 1.

    Returns:
      float32, zeros past each length.
    """
    table = params["token_embedding"]["embedding"]
    x = jnp.asarray(table[tokens], jnp.float32)  # of a table in host memory, only rows are sent
    for i in range(cfg.num_layers):
        x = _apply_layer(cfg, params["blocks"][str(i)], x, lengths)
    return _finish(cfg, params["norm"]["scale"], x, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _apply_layer(cfg: UMT5Config, params: Params, x: Array, lengths: Array) -> Array:
    return nnx.merge(_layer_graph(cfg), params)(x, _visible(x, lengths))


@functools.partial(jax.jit, static_argnums=0)
def _finish(cfg: UMT5Config, scale: Array, x: Array, lengths: Array) -> Array:
    return jnp.where(_visible(x, lengths)[..., None], rms_norm(x, scale, cfg.eps), 0)


def _visible(x: Array, lengths: Array) -> Array:
    return jnp.arange(x.shape[1]) < lengths[:, None]
