"""AdamW or Muon, with learning rates per parameter pattern and selective weight decay."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from arl2_jax.config import PhaseConfig
from arl2_jax.errors import ConfigError
from arl2_jax.parameters import ParameterFacts, declare, facts_of

declare({r"muon/\w+/ns_coeffs": ParameterFacts(axes=(None,))})  # in Muon's state
# Root mean square of an AdamW update in practice. An orthogonal update scaled to it can share the
# learning rate and the decay of AdamW (arXiv 2502.16982, section 2.2).
ADAM_RMS = 0.2


def path_name(path) -> str:
    """Return a parameter's path as text: blocks/0/self_attn/q/kernel."""
    return "/".join(str(getattr(entry, "key", entry)) for entry in path)


def learning_rate(phase: PhaseConfig) -> optax.Schedule:
    """Return a schedule: linear warm-up, then a cosine down to a fraction of the peak."""
    decay = max(phase.steps - phase.warmup, 1)
    peak = phase.learning_rate
    cosine = optax.cosine_decay_schedule(peak, decay, phase.final_learning_rate)
    warmup = optax.linear_schedule(peak / (phase.warmup + 1), peak, phase.warmup)
    return optax.join_schedules([warmup, cosine], [phase.warmup])


def learning_rate_factors(phase: PhaseConfig, params: Any) -> Any:
    """Return the factor of every parameter: that of the first pattern in its path, or 1.

    Raises:
      ConfigError: a pattern applies to no parameter of the phase.
    """
    patterns = [(re.compile(p), factor) for p, factor in phase.learning_rates]
    used = set()

    def factor(path, _):
        for pattern, value in patterns:
            if pattern.search(path_name(path)):
                used.add(pattern.pattern)
                return value
        return 1.0

    factors = jax.tree_util.tree_map_with_path(factor, params)
    idle = [pattern.pattern for pattern, _ in patterns if pattern.pattern not in used]
    if idle:
        raise ConfigError(
            f"has {idle[0]!r}, which no trained parameter's path contains or which an earlier "
            "pattern hides",
            field="learning_rates",
            remedy="remove it",
        )
    return factors


def make_optimizer(
    phase: PhaseConfig, params: Any, *, value_scale: float = 1.0
) -> optax.GradientTransformation:
    """Build the optimizer of a phase: clipping, AdamW or Muon, decay and learning rates.

    Muon (kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by the nearest
    orthogonal matrix; all parameters other than the layers' matrices use AdamW. Weight decay pulls
    the memory's projections P towards their initial values, and all else towards zero.

    Args:
      phase: the phase.
      params: the trained parameters or their shapes.
      value_scale: P_v starts as this times the identity.
    """
    factors = learning_rate_factors(phase, params)
    scale = lambda updates: jax.tree.map(lambda u, f: u * f, updates, factors)
    return optax.chain(
        optax.clip_by_global_norm(phase.clip_norm),
        _precondition(phase, params),
        optax.stateless(_add_decay(phase.weight_decay, value_scale)),
        optax.stateless(lambda updates, params: scale(updates)),
        optax.scale_by_learning_rate(learning_rate(phase)),
    )


def _add_decay(rate: float, value_scale: float):
    """Return a transform that adds decay towards zero, or towards a projection's start."""

    def add(path, update, param):
        name = path_name(path)
        if not facts_of(name).decay:
            return update
        if re.search(r"phi_[qkv]$", name):
            scale = value_scale if name.endswith("phi_v") else 1.0
            param = param - scale * jnp.eye(param.shape[-1], dtype=param.dtype)
        return update + rate * param

    return lambda updates, params: jax.tree_util.tree_map_with_path(add, updates, params)


def _precondition(phase: PhaseConfig, params: Any) -> optax.GradientTransformation:
    """Return the transform of gradients to directions of about unit scale."""
    adam = optax.scale_by_adam(b1=0.9, b2=phase.b2)
    if phase.optimizer == "adamw":
        return adam
    kinds = jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if facts_of(path_name(path)).matrix else "adam", params
    )
    axes = lambda x: optax.contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1)
    muon = optax.contrib.scale_by_muon(
        beta=0.9, weight_dimension_numbers=lambda updates: jax.tree.map(axes, updates)
    )
    size = lambda x: x * (ADAM_RMS * max(x.shape[-2:]) ** 0.5)
    scale = optax.stateless(lambda updates, _: jax.tree.map(size, updates))
    return optax.partition({"adam": adam, "muon": optax.chain(muon, scale)}, kinds)
