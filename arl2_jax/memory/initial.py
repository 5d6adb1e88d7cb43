"""Initial values of a gated delta memory: decays, strengths and the scale of the read."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from arl2_jax.config import AttentionConfig, GatedDeltaConfig
from arl2_jax.errors import ConfigError


class InitialValues(NamedTuple):
    """Initial parameters that set a memory's time constants.

    Attributes:
      A_log, dt_bias: g = -exp(A_log) softplus(x Wa + dt_bias), [H] float32.
      beta_bias: constant part of the strength before its sigmoid, [H] float32; None if the memory
        has none.
    """

    A_log: Float[Array, "h"]
    dt_bias: Float[Array, "h"]
    beta_bias: Float[Array, "h"] | None


def values(
    settings: GatedDeltaConfig, cfg: AttentionConfig, rate_key: Array, step_key: Array
) -> InitialValues:
    """Draw the initial values of one layer.

    Args:
      settings: of the memory.
      cfg: `memory_init` chooses between ARL2's code and constants by block.
      rate_key, step_key: random keys.

    Raises:
      ConfigError: "by_block" without the number of tokens in a block.
    """
    if cfg.memory_init == "by_block":
        return _by_block(settings, cfg, rate_key)
    rates = jax.random.uniform(rate_key, (cfg.num_heads,), minval=1e-4, maxval=16.0)
    low, high = jnp.log(1e-3), jnp.log(1e-1)
    steps = jnp.exp(jax.random.uniform(step_key, (cfg.num_heads,), minval=low, maxval=high))
    return InitialValues(jnp.log(rates), _inverse_softplus(steps), None)


def value_scale(settings: GatedDeltaConfig, cfg: AttentionConfig) -> float:
    """Return c of the initial P_v = c I."""
    if cfg.memory_init == "published":
        return 1.0
    return settings.read_gain * cfg.head_dim**0.5


def initial_strength(tokens: int, head_dim: int, load: float) -> float:
    """Return the beta whose writes leave exp(-load) of a state over a block.

    A write with a unit key in a random direction leaves 1 - beta (2 - beta) / D of a state's
    squared norm, so that n of them leave (1 - beta (2 - beta) / D)^n. For small beta the load is
    n beta / D. The largest start is 1, which erases the previous value of its key.

    Args:
      tokens: n, of a block.
      head_dim: D.
      load: the wanted load.
    """
    erased = -head_dim * math.expm1(-2 * load / tokens)
    return 1 - math.sqrt(max(1 - erased, 0))


def _by_block(settings: GatedDeltaConfig, cfg: AttentionConfig, key: Array) -> InitialValues:
    heads = cfg.num_heads
    if not settings.block_tokens:
        raise ConfigError(
            "needs the tokens of a frame block",
            field="model.memory_init",
            value="by_block",
            remedy="set model.delta.block_tokens, or let a run's data set it",
        )
    # One time constant from each of as many equal parts of the range as there are heads.
    order_key, place_key = jax.random.split(key)
    parts = jax.random.permutation(order_key, heads) + jax.random.uniform(place_key, (heads,))
    short, long = settings.time_constants
    blocks = short * (long / short) ** (parts / heads)
    steps = 1 / (blocks * settings.block_tokens)
    strength = initial_strength(settings.block_tokens, cfg.head_dim, settings.write_load)
    # Inside the range of a sigmoid, where it still has a slope.
    share = min(strength / settings.beta_max, 0.95)
    bias = jnp.full(heads, math.log(share / (1 - share)))
    return InitialValues(jnp.zeros(heads), _inverse_softplus(steps), bias)


def _inverse_softplus(x: Array) -> Array:
    return x + jnp.log(-jnp.expm1(-x))
