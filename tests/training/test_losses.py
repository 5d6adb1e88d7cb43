"""Each loss against its definition, and which parameters its gradient reaches."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from arl2_jax import models
from arl2_jax.config import SamplerConfig
from arl2_jax.models import wan
from arl2_jax.training import losses
from arl2_jax.training.partition import TRAINED, merge_params, split_params
from arl2_jax.training.step import _stage2_gradients, select_trained


@pytest.fixture(scope="module")
def noised(cfg, clip):
    return jax.jit(losses.noise_clip, static_argnums=(1, 4))(
        jax.random.key(0), cfg, clip.clean, clip.text, SamplerConfig(shift=5.0)
    )


@pytest.fixture(scope="module")
def distill():
    return jax.jit(losses.distill_layers, static_argnums=1)


@pytest.fixture(scope="module")
def distilled(distill, params, cfg, noised):
    return distill(params, cfg, noised)


def test_noise_has_one_level_a_block(noised, cfg):
    s = np.asarray(noised.s).reshape(2, 3, cfg.frames_per_block)
    assert np.all(s == s[..., :1]) and len(np.unique(s)) == 6 and 0 < s.min() < s.max() < 1
    level = noised.s[..., None, None, None]
    # One rounding of each product.
    np.testing.assert_allclose(
        noised.noisy, (1 - level) * noised.clean + level * noised.eps, atol=1e-6
    )
    np.testing.assert_array_equal(noised.timestep, 1000 * noised.s)


def test_flow_matching_is_its_definition(cfg, params, noised, apply_clip):
    loss, _ = jax.jit(losses.flow_matching, static_argnums=1)(params, cfg, noised)
    flow, _ = apply_clip(params, cfg, noised.clean, noised.noisy, noised.timestep, noised.text)
    wanted = np.mean((np.float64(flow) - (noised.eps - noised.clean)) ** 2)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_distillation_weighs_flow_and_x0(cfg, params, noised, apply_clip):
    target = jax.random.normal(jax.random.key(1), noised.noisy.shape)
    loss, _ = jax.jit(losses.distillation, static_argnums=1)(params, cfg, noised, target)
    flow, _ = apply_clip(params, cfg, noised.clean, noised.noisy, noised.timestep, noised.text)
    level = np.float64(noised.s)[..., None, None, None]
    x0, target_x0 = (noised.noisy - level * np.float64(v) for v in (flow, target))
    wanted = np.mean((np.float64(flow) - target) ** 2) + np.mean((x0 - target_x0) ** 2)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_student_without_a_past_is_the_teacher(cfg, params, noised):
    """In the first block the memory is empty; without FFN updates nothing else differs."""
    flat = traverse_util.flatten_dict(params, sep="/")
    plain = traverse_util.unflatten_dict(
        {p: 0 * x if "lora_fc" in p and p.endswith("/b") else x for p, x in flat.items()}, sep="/"
    )

    @jax.jit
    def loss(params, clip):
        target = losses.teacher_flow(params, cfg, clip)
        return losses.distillation(params, cfg, clip, target)[0]

    first = jax.tree.map(lambda x: x[:, :2], noised)._replace(text=noised.text)
    assert loss(plain, first) < 1e-10  # (1e-5)^2: float32 sums in another order
    assert loss(plain, noised) > 1e-4
    assert loss(params, first) > 1e-4


def layer_error(params, cfg, clip, layer, delta):
    """Error of one layer's attention at the teacher's input, from the teacher's layers in turn."""
    teacher = cfg.teacher()
    stem = wan.make_stem(cfg, {n: node for n, node in params.items() if n != "blocks"})
    tokens = wan.embed_clip(stem, cfg, clip.clean, clip.noisy, clip.timestep, clip.text)
    x = tokens.x
    for i in range(layer + 1):
        base = models.without_delta(params)["blocks"][str(i)]
        softmax = wan.make_layer(teacher, 0, base)
        h = softmax.attention_input(x, tokens.conditions)
        wanted, _ = softmax.attend_clip(h, tokens.conditions, 3, 2)
        x, _ = softmax.clip(x, tokens.conditions, softmax.cross_attn.encode(tokens.text), 3, 2)
    student = wan.make_layer(cfg, 0, base | {"delta": delta})
    out, _ = student.attend_clip(h, tokens.conditions, 3, 2)
    per_clip = lambda y: jnp.mean(jnp.square(y).reshape(len(clip.clean), -1), axis=1)
    return jnp.mean(per_clip(out - wanted) / per_clip(wanted))


@pytest.mark.parametrize("layer", [0, 1])
def test_layer_gradients_are_those_of_each_own_error(cfg, params, noised, distilled, error, layer):
    delta = params["blocks"][str(layer)]["delta"]
    own = lambda delta: layer_error(params, cfg, noised, layer, delta)
    value, gradient = jax.jit(jax.value_and_grad(own))(delta)
    np.testing.assert_allclose(distilled.errors[str(layer)], value, rtol=1e-5)
    found = models.layer_of(distilled.gradients, layer)["delta"]
    for (path, wanted), g in zip(
        jax.tree_util.tree_leaves_with_path(gradient), jax.tree.leaves(found), strict=True
    ):
        name = jax.tree_util.keystr(path)
        if "lora_fc" in name:
            assert not np.any(g) and not np.any(wanted), name  # not part of the attention
        else:
            assert np.any(wanted) and error(g, wanted) < 1e-4, name  # sums that cancel


def test_layers_learn_independently(distill, cfg, params, noised, distilled):
    """Another layer's memory affects neither the error nor the gradient of a layer."""
    worse = jax.tree.map(lambda x: x, params)
    worse["blocks"]["0"]["delta"] = jax.tree.map(lambda x: x + 0.3, worse["blocks"]["0"]["delta"])
    other = distill(worse, cfg, noised)
    assert other.errors["0"] != distilled.errors["0"]
    assert other.errors["1"] == distilled.errors["1"]
    for a, b in zip(
        jax.tree.leaves(models.layer_of(other.gradients, 1)),
        jax.tree.leaves(models.layer_of(distilled.gradients, 1)), strict=True,
    ):  # fmt: skip
        np.testing.assert_array_equal(a, b)
    assert set(distilled.errors) == {"0", "1"}
    assert models.runs_of(distilled.gradients) == [(0, 2)]


def test_closed_gate_has_nothing_to_learn_in_stage_one(distill, cfg, params, noised):
    memory_off = dataclasses.replace(cfg, memory_gate="zero")
    found = distill(params, memory_off, noised)
    assert not any(np.any(g) for g in jax.tree.leaves(found.gradients))
    assert all(value > 0 for value in found.errors.values())


def test_teacher_flow_is_the_softmax_model(cfg, params, noised, apply_clip, error):
    """For any values of the additions."""
    flow = jax.jit(losses.teacher_flow, static_argnums=1)(params, cfg, noised)
    wanted, _ = apply_clip(
        models.without_delta(params), cfg.teacher(),
        noised.clean, noised.noisy, noised.timestep, noised.text,
    )  # fmt: skip
    assert error(flow, wanted) < 1e-5  # another program of the same sums


def test_stage_one_trains_the_memory_without_low_rank_updates(params):
    trained, frozen = split_params(params, TRAINED["stage1"])
    names = {path.split("/delta/")[1].split("/")[0] for path in flat(trained)}
    assert names == {
        "phi_q", "phi_k", "phi_v", "a_proj", "b_proj", "gate_proj", "A_log", "dt_bias"
    }  # fmt: skip
    assert any("lora" in path for path in flat(frozen))


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def test_relative_error_is_a_mean_over_clips():
    target = jnp.asarray([[1.0, 1.0], [10.0, 10.0]])
    # 1 of 1 in the first clip, 1 of 100 in the second.
    np.testing.assert_allclose(losses.relative_error(target + 1, target), (1 + 0.01) / 2, rtol=1e-6)
    assert losses.relative_error(jnp.zeros((2, 3)), jnp.zeros((2, 3))) == 0


def test_distil_layers_also_returns_the_teachers_flow(cfg, params, noised, distilled, error):
    wanted = jax.jit(losses.teacher_flow, static_argnums=1)(params, cfg, noised)
    # float32 sums of another program, through three layers.
    assert error(distilled.teacher_flow, wanted) < 2e-5


def test_stage2_runs_the_teacher_once(config, make_params):
    """With a layer loss the target comes from its teacher pass: same gradients, one pass fewer."""
    run = dataclasses.replace(config, stage2=dataclasses.replace(config.stage2, layer_loss=0.5))
    params = models.stack_params(make_params(run.model), run.model)
    trained, frozen = split_params(params, TRAINED["stage2"])
    latents = jax.random.normal(jax.random.key(0), (2, run.data.frames, *run.latent_shape))
    text = jax.random.normal(jax.random.key(1), (2, run.model.text_len, run.model.text_dim))
    clip = losses.noise_clip(jax.random.key(2), run.model, latents, text, run.sampler)

    def twice(trained, clip):
        params = merge_params(trained, frozen)
        target = losses.teacher_flow(params, run.model, clip)
        loss = lambda t: losses.distillation(merge_params(t, frozen), run.model, clip, target)[0]
        local = losses.distill_layers(params, run.model, clip).gradients
        add = lambda g, own: g + 0.5 * own
        return jax.tree.map(add, jax.grad(loss)(trained), select_trained(trained, local))

    once = lambda trained, clip: _stage2_gradients(run, trained, frozen, clip)[0]
    teacher = lambda trained, clip: losses.teacher_flow(
        merge_params(trained, frozen), run.model, clip
    )
    found, wanted = jax.jit(once)(trained, clip), jax.jit(twice)(trained, clip)
    chex.assert_trees_all_close(found, wanted, rtol=1e-3, atol=1e-6)  # sums with both signs
    count = lambda f: products(jax.make_jaxpr(f)(trained, clip).jaxpr)
    assert count(once) == count(twice) - count(teacher)


def products(jaxpr):
    """Matrix products that a program makes, those of a scan as often as it runs."""
    total = 0
    for eqn in jaxpr.eqns:
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        total += eqn.primitive.name == "dot_general"
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * products(inner)
    return total
