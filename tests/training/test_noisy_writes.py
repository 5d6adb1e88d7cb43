"""Blocks may be noised before they are written: the same in all losses and forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax import models
from arl2_jax.config import SamplerConfig
from arl2_jax.training import losses, start
from arl2_jax.training.losses import NoisedClip
from arl2_jax.training.partition import TRAINED, split_params
from arl2_jax.training.start import least_squares_start
from arl2_jax.training.step import accumulate, init_state, make_step

LEVEL = 0.3
CLEAN, NOISY = SamplerConfig(), SamplerConfig(context_noise=LEVEL)
noise_clip = jax.jit(losses.noise_clip, static_argnums=(1, 4))
distill = jax.jit(losses.distill_layers, static_argnums=1)


@pytest.fixture(scope="module")
def clean(cfg, clip):
    return noise_clip(jax.random.key(0), cfg, clip.clean, clip.text, CLEAN)


@pytest.fixture(scope="module")
def noisy(cfg, clip):
    return noise_clip(jax.random.key(0), cfg, clip.clean, clip.text, NOISY)


def test_level_zero_draws_and_changes_nothing(cfg, clean, noisy):
    trace = jax.make_jaxpr(losses.noise_clip, static_argnums=(1, 4))
    program = lambda sampler: str(trace(jax.random.key(0), cfg, clean.clean, clean.text, sampler))
    # The key of a noise that is not needed is not even made.
    assert "fold_in" in program(NOISY) and "fold_in" not in program(CLEAN)
    assert clean.context is clean.clean and clean.context_timestep is None
    # What is denoised is the same at every level, so that levels can be compared.
    for name in ("clean", "noisy", "eps", "s", "text"):
        np.testing.assert_array_equal(getattr(noisy, name), getattr(clean, name))


def test_losses_at_level_zero_are_the_programs_of_a_clean_past(cfg, params, clean):
    """The lowered text is equal: the true clip at timestep 0, in the loss and its gradient."""

    def defined(params, clip):
        flow = models.apply_clip(params, cfg, clip.clean, clip.noisy, 1000 * clip.s, clip.text)[0]
        return jnp.mean(jnp.square(flow - (clip.eps - clip.clean)))

    def found(params, clip):
        return losses.flow_matching(params, cfg, clip)[0]

    def program(loss):
        lowered = jax.jit(jax.value_and_grad(loss)).lower(params, clean).as_text()
        return lowered.replace(loss.__name__, "loss")

    assert program(found) == program(defined)


def test_context_is_the_clip_at_its_level_with_separate_noise(noisy):
    np.testing.assert_array_equal(noisy.context_s, jnp.full(noisy.s.shape, LEVEL))
    np.testing.assert_array_equal(noisy.context_timestep, 1000 * noisy.context_s)
    eps = ((noisy.context - (1 - LEVEL) * noisy.clean) / LEVEL).ravel()
    # 1152 numbers: means and correlations are off by 0.03, the deviation by 0.02.
    assert abs(eps.mean()) < 0.12 and abs(eps.std() - 1) < 0.1
    for other in (noisy.clean, noisy.eps):
        assert abs(np.corrcoef(eps, other.ravel())[0, 1]) < 0.12


def test_clip_form_is_block_form(cfg, params, noisy, clean, apply, error):
    """Block by block, each one written as the context says, at the timestep that it says."""
    f, flows = cfg.frames_per_block, []
    memory = models.init_memory(cfg, batch=2, frames=6, tokens_per_frame=6)
    for first in range(0, 6, f):
        part = jax.tree.map(lambda x, i=first: x[:, i : i + f], noisy)
        now = dict(memory=memory, position=jnp.int32(first))
        flows.append(apply(params, cfg, part.noisy, part.timestep, noisy.text, **now)[0])
        _, memory = apply(
            params, cfg, part.context, part.context_timestep, noisy.text, **now, write=True
        )
    wanted = jnp.concatenate(flows, axis=1)
    predict = jax.jit(losses.predict, static_argnums=1)
    found, _ = predict(params, cfg, noisy)
    # float32 sums of up to a hundred terms in another order, through three layers.
    assert error(found, wanted) < 2e-5
    # The level is no small matter, and the timestep is a part of it.
    untold = noisy._replace(context_s=0 * noisy.context_s)
    for other in (clean, untold):
        assert error(predict(params, cfg, other)[0][:, f:], wanted[:, f:]) > 1e-3
    explicit = clean._replace(noised_context=clean.clean, context_s=0 * clean.s)
    assert error(predict(params, cfg, explicit)[0], predict(params, cfg, clean)[0]) < 2e-5


@pytest.mark.slow
def test_flow_is_that_of_the_true_clip(cfg, params, noisy):
    """The noise of what is written is not predicted; and every parameter matters."""

    def loss(params, clip):
        return losses.flow_matching(params, cfg, clip)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params, noisy)
    flow = jax.jit(losses.predict, static_argnums=1)(params, cfg, noisy)[0]
    wanted = np.mean((np.float64(flow) - (noisy.eps - noisy.clean)) ** 2)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(g)) and np.any(g), jax.tree_util.keystr(path)


def test_student_and_teacher_remember_the_same(cfg, params, noisy, clean, error):
    """The teacher's own softmax caches are noised as well."""
    flow = jax.jit(losses.teacher_flow, static_argnums=1)
    teacher, arguments = models.without_delta(params), (noisy.noisy, noisy.timestep, noisy.text)
    wanted = jax.jit(models.apply_clip, static_argnums=1)(
        teacher, cfg.teacher(), noisy.context, *arguments, 1000 * noisy.context_s
    )[0]
    found = flow(params, cfg, noisy)
    assert error(found, wanted) < 1e-5  # another program of the same sums
    assert error(flow(params, cfg, clean), wanted) > 1e-3


@pytest.mark.slow
def test_stage_one_and_its_start_see_the_noised_past(cfg, params, noisy, clean, monkeypatch):
    monkeypatch.setattr(start, "ROUNDS", 0)
    found = distill(params, cfg, noisy)
    _, errors = least_squares_start(params, cfg, [noisy], jax.random.key(0))
    other = distill(params, cfg, clean)
    for layer in ("0", "1"):
        # The same sums in another order.
        np.testing.assert_allclose(errors[layer].before, found.errors[layer], rtol=1e-4)
        assert errors[layer].after < errors[layer].before
        assert abs(found.errors[layer] / other.errors[layer] - 1) > 1e-3
        delta = models.layer_of(found.gradients, int(layer))["delta"]
        assert all(np.any(g) for name, g in delta.items() if name.startswith("phi"))


def test_micro_batches_take_the_past_of_their_clips(unchecked):
    clip = NoisedClip(*([jnp.arange(8.0)] * 7))
    seen = lambda micro: ({"same": jnp.all(micro.context == micro.clean).astype(jnp.float32)}, {})
    assert accumulate(seen, clip, 2)[0]["same"] == 1


@pytest.mark.slow
def test_a_step_obeys_the_setting(config, make_params):
    """Stage 2 of a run, teacher's and student's pass and the layers' errors included."""
    params = models.stack_params(make_params(config.model), config.model)
    trained, frozen = split_params(params, TRAINED["stage2"])
    rng = np.random.default_rng(0)
    batch = {
        "latents": rng.standard_normal((2, 4, 2, 6, config.model.in_dim), np.float32),
        "text": rng.standard_normal((2, 4, 8), np.float32),
    }

    def metrics(level):
        sampler = dataclasses.replace(config.sampler, context_noise=level)
        changed = dataclasses.replace(config, sampler=sampler)
        state = init_state(changed, "stage2", trained, jax.random.key(5))
        return jax.jit(make_step(changed, "stage2"))(state, frozen, batch)[1]

    plain, changed = metrics(0.0), metrics(LEVEL)
    for name in ("loss", "layer_error"):
        assert np.isfinite(changed[name]) and abs(changed[name] / plain[name] - 1) > 1e-4, name


def test_misfit_context_is_refused(cfg, params, noisy, unchecked):
    run = lambda clip: losses.predict(params, cfg, clip)
    with pytest.raises(ValueError, match="must be one per frame"):
        jax.eval_shape(run, noisy._replace(context_s=noisy.s[:, :2]))
