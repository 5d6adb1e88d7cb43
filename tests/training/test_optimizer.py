"""Rates, decay and clipping reach the parameters they are meant for."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arl2_jax import models
from arl2_jax.config import PhaseConfig
from arl2_jax.errors import ConfigError
from arl2_jax.training.optimizer import (
    learning_rate,
    learning_rate_factors,
    make_optimizer,
    path_name,
)


def named_leaves(tree):
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_schedule():
    phase = PhaseConfig(steps=110, learning_rate=2.0, warmup=10, final_learning_rate=0.1)
    rate = jax.vmap(learning_rate(phase))(jnp.arange(111))
    # float32 in every comparison.
    np.testing.assert_allclose(rate[:11], 2.0 * np.arange(1, 12) / 11, rtol=1e-6)
    middle = 0.1 + 0.9 * (1 + np.cos(np.pi * np.arange(101) / 100)) / 2
    np.testing.assert_allclose(rate[10:], 2.0 * middle, rtol=1e-5)
    assert np.all(rate > 0)


@pytest.mark.parametrize("warmup", [0, 5, 20])
def test_schedule_of_short_phases_is_finite(warmup):
    rate = learning_rate(PhaseConfig(steps=5, warmup=warmup, learning_rate=1.0))
    values = [float(rate(step)) for step in range(6)]
    assert all(0 < value <= 1 for value in values)
    assert warmup or values[0] == 1


def test_decay_pulls_to_zero_or_to_the_identity(cfg, params):
    """Without a gradient, what moves is decayed: P towards the identity, all else to zero."""
    phase = PhaseConfig(learning_rate=1.0, warmup=0, weight_decay=0.5, steps=10)
    optimizer = make_optimizer(phase, params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(optimizer.update)(zeros, optimizer.init(params), params)
    values = named_leaves(params)
    spared = re.compile(r"/(A_log|dt_bias|bias|scale|modulation)$")
    for name, update in named_leaves(updates).items():
        decayed = 0 if spared.search(f"/{name}") else -0.5
        end = np.eye(values[name].shape[-1]) if "phi_" in name else 0
        wanted = decayed * (values[name] - np.float32(end))
        np.testing.assert_allclose(update, wanted, rtol=1e-6, atol=1e-7, err_msg=name)
    kinds = {name.rsplit("/", 1)[-1] for name in values}
    assert {"A_log", "dt_bias", "bias", "scale", "modulation", "kernel", "phi_q", "a"} <= kinds


def test_factors_scale_the_whole_update(cfg, params):
    """The first pattern found counts; decay follows the rate, and the schedule too."""
    patterns = ((r"delta/lora_q/a$", 0.0), (r"delta/lora", 10.0), (r"A_log|dt_bias", 0.1))
    phase = PhaseConfig(learning_rate=0.5, warmup=0, learning_rates=patterns, steps=10)
    factors = named_leaves(learning_rate_factors(phase, params))
    assert factors["blocks/0/delta/lora_q/a"] == 0
    assert factors["blocks/1/delta/lora_q/b"] == factors["blocks/0/delta/lora_fc1/a"] == 10
    assert factors["blocks/1/delta/A_log"] == 0.1
    assert factors["blocks/2/self_attn/q/kernel"] == 1
    plain = PhaseConfig(learning_rate=0.5, warmup=0, steps=10)

    @jax.jit
    def both(gradients):
        step = lambda p: make_optimizer(p, params).update(
            gradients, make_optimizer(p, params).init(params), params
        )[0]
        return step(phase), step(plain)

    found, wanted = both(jax.tree.map(jnp.cos, params))
    wanted = named_leaves(wanted)
    for name, update in named_leaves(found).items():
        np.testing.assert_allclose(update, factors[name] * wanted[name], rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("patterns", "idle"),
    [((("nothing_here", 2.0),), "nothing_here"), (((r"delta", 1.0), (r"A_log", 2.0)), "A_log")],
)
def test_pattern_without_a_parameter_is_refused(params, patterns, idle):
    with pytest.raises(ConfigError, match=f"learning_rates has '{idle}'"):
        make_optimizer(PhaseConfig(learning_rates=patterns), params)


def test_gradient_is_clipped_by_its_global_norm():
    layer = lambda bias, kernel: {"self_attn": {"q": {"bias": bias, "kernel": kernel}}}
    params = layer(jnp.zeros(3), jnp.zeros((2, 2)))
    optimizer = make_optimizer(PhaseConfig(clip_norm=0.5), params)
    gradients = layer(jnp.full(3, 3.0), jnp.full((2, 2), 4.0))
    _, state = optimizer.update(gradients, optimizer.init(params), params)
    moments = optax.tree.scale(1 / 0.1, state[1].mu)  # the first moment keeps 1 - b1 of it
    np.testing.assert_allclose(optax.tree.norm(moments), 0.5, rtol=1e-6)
    _, state = optimizer.update(optax.tree.scale(1e-3, gradients), optimizer.init(params), params)
    np.testing.assert_allclose(state[1].mu["self_attn"]["q"]["kernel"], 0.1 * 4e-3, rtol=1e-6)


def test_made_of_shapes_as_of_parameters(cfg):
    shapes = models.param_shapes(cfg)
    state = jax.eval_shape(make_optimizer(PhaseConfig(), shapes).init, shapes)
    assert jax.tree.structure(state[1].mu) == jax.tree.structure(shapes)


def test_muon_makes_the_layers_matrices_orthogonal_and_leaves_the_rest(params):
    """Singular values near one, at the size of an AdamW update; all else is AdamW's."""
    settings = dict(learning_rate=1.0, warmup=0, weight_decay=0.0, steps=10, clip_norm=1e9)
    gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.size), x.shape), params)

    @jax.jit
    def both(gradients):
        step = lambda p: make_optimizer(p, params).update(
            gradients, make_optimizer(p, params).init(params), params
        )[0]
        return step(PhaseConfig(optimizer="muon", **settings)), step(PhaseConfig(**settings))

    found, adam = (named_leaves(tree) for tree in both(gradients))
    orthogonal = set()
    for name, update in found.items():
        if np.array_equal(update, adam[name]):
            continue
        orthogonal.add(name.split("/", 2)[2])
        values = np.linalg.svd(update, compute_uv=False) / (0.2 * max(update.shape[-2:]) ** 0.5)
        # Five steps of the iteration end in [0.68, 1.14] unless a value was near zero before.
        assert values.max() < 1.2 and np.median(values) > 0.6, name
    attention = {f"{a}_attn/{m}/kernel" for a in ("self", "cross") for m in "qkvo"}
    memory = {f"delta/phi_{m}" for m in "qkv"}
    low_rank = {f"delta/lora_{m}/{side}" for m in ("q", "k", "v", "fc1", "fc2") for side in "ab"}
    assert orthogonal == attention | memory | low_rank | {"ffn/fc1/kernel", "ffn/fc2/kernel"}


def test_muon_leaves_what_has_no_gradient():
    params = {"blocks": {"0": {"self_attn": {"q": {"kernel": jnp.ones((4, 4))}}}}}
    optimizer = make_optimizer(PhaseConfig(optimizer="muon", weight_decay=0.0), params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert not jax.tree.leaves(updates)[0].any()
