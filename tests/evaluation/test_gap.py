"""Losses and errors on held-out clips equal their definitions, clip by clip."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax import sharding
from arl2_jax.config import MeshConfig, ModelConfig, SamplerConfig
from arl2_jax.diffusion import add_noise, noise_levels, predict_x0
from arl2_jax.evaluation import gap
from arl2_jax.models import param_shapes, without_delta
from arl2_jax.training import losses

CFG = ModelConfig.tiny(
    dim=32, ffn_dim=32, num_heads=2, num_layers=2, hybrid_layers=(1,), in_dim=4, out_dim=4,
    text_dim=8, text_len=3,
)  # fmt: skip
SAMPLER = SamplerConfig(timesteps=(1000.0, 400.0), shift=3.0)
KEY = jax.random.key(0, impl="rbg")
# More than a micro-batch, and not a multiple of it.
CLIPS = gap.MICRO_BATCH + 3


predict = jax.jit(losses.predict, static_argnums=1)


@pytest.fixture(scope="module")
def params():
    """Random everywhere: at its initial values the network predicts zeros."""
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.normal, 0.1, 0.2)
    return jax.tree.map(lambda x: jnp.float32(draw(x.shape)), param_shapes(CFG))


@pytest.fixture(scope="module")
def clips():
    rng = np.random.default_rng(1)
    return {
        "latents": rng.standard_normal((CLIPS, 6, 2, 4, 4), np.float32),
        "text": rng.standard_normal((CLIPS, 3, 8), np.float32),
    }


@pytest.fixture(scope="module")
def clip(clips):
    noise = jax.jit(losses.noise_clip, static_argnums=(1, 4))
    return noise(KEY, CFG, clips["latents"], clips["text"], SAMPLER)


@pytest.fixture(scope="module")
def errors(params, clip):
    """Sums of |x0 - x0_teacher|^2 and |x0_teacher|^2 by the definition, [2, levels, blocks]."""

    def sums(x):
        return np.square(x).reshape(CLIPS, 3, -1).sum(axis=(0, 2))

    pairs = []
    for level in noise_levels(SAMPLER):
        s = jnp.full(clip.s.shape, level)
        at = clip._replace(noisy=add_noise(clip.clean, clip.eps, s), s=s)
        x0 = predict_x0(at.noisy, predict(params, CFG, at)[0], s)
        target = predict_x0(at.noisy, predict(without_delta(params), CFG.teacher(), at)[0], s)
        pairs.append([sums(x0 - target), sums(target)])
    return np.moveaxis(np.array(pairs), 1, 0)


def test_loss_is_that_of_training(params, clips, clip):
    for cfg, model in ((CFG, params), (CFG.teacher(), without_delta(params))):
        expected = jnp.mean(jnp.square(predict(model, cfg, clip)[0] - (clip.eps - clip.clean)))
        found = gap.held_out_losses(model, cfg, clips, SAMPLER, KEY)
        # Float32 sums in another order.
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_what_is_written_may_be_noised(params, clips, clip):
    """In the loss and in the teacher's and the student's flow alike."""
    sampler = dataclasses.replace(SAMPLER, timesteps=(400.0,), context_noise=0.3)
    noise = jax.jit(losses.noise_clip, static_argnums=(1, 4))
    noised = noise(KEY, CFG, clips["latents"], clips["text"], sampler)
    np.testing.assert_array_equal(noised.noisy, clip.noisy)
    expected = jnp.mean(jnp.square(predict(params, CFG, noised)[0] - (clip.eps - clip.clean)))
    found = gap.held_out_losses(params, CFG, clips, sampler, KEY)
    np.testing.assert_allclose(found, expected, rtol=1e-5)

    s = jnp.full(clip.s.shape, noise_levels(sampler)[0])
    at = noised._replace(noisy=add_noise(clip.clean, clip.eps, s), s=s)
    x0 = predict_x0(at.noisy, predict(params, CFG, at)[0], s)
    target = predict_x0(at.noisy, predict(without_delta(params), CFG.teacher(), at)[0], s)
    error, size = (np.sum(np.square(x[:, 2:])) for x in (x0 - target, target))
    errors = gap.teacher_error(params, CFG, without_delta(params), clips, sampler, KEY)
    # A ratio of float32 sums of small differences.
    np.testing.assert_allclose(errors.by_timestep, [error / size], rtol=1e-4)


def test_error_is_relative_to_the_teacher_from_the_second_block_on(params, clips, errors):
    found = gap.teacher_error(params, CFG, without_delta(params), clips, SAMPLER, KEY)
    error, size = errors[:, :, 1:].sum(axis=-1)
    np.testing.assert_allclose(found.by_timestep, error / size, rtol=1e-4)
    np.testing.assert_allclose(found.mean, np.mean(error / size), rtol=1e-4)
    assert found.mean > 1e-3
    everywhere = errors.sum(axis=-1)
    assert not np.allclose(found.by_timestep, everywhere[0] / everywhere[1], rtol=1e-2)


def test_students_share_a_teacher(params, clips):
    teacher = without_delta(params)
    other = jax.tree.map(lambda x: x, params)
    other["blocks"]["1"]["delta"] = jax.tree.map(jnp.zeros_like, params["blocks"]["1"]["delta"])
    closed = dataclasses.replace(CFG, memory_gate="local")
    students = {
        "one": gap.Model(params, CFG),
        "other": gap.Model(other, CFG),
        "closed": gap.Model(params, closed),
    }
    original = gap.Model(teacher, CFG.teacher())
    found = gap.teacher_errors(students, original, clips, SAMPLER, KEY)
    for name, student in students.items():
        alone = gap.teacher_error(*student, teacher, clips, SAMPLER, KEY)
        np.testing.assert_array_equal(found[name].by_timestep, alone.by_timestep)
    assert len({error.mean for error in found.values()}) == 3


def test_the_teacher_is_no_distance_from_itself(params, clips):
    teacher = without_delta(params)
    found = gap.teacher_error(teacher, CFG.teacher(), teacher, clips, SAMPLER, KEY)
    assert found.mean == 0 and not found.by_timestep.any()


def test_one_block_has_no_past():
    found = gap._relative([np.zeros(2)] * 2, levels=2)
    assert np.isnan(found.mean) and np.isnan(found.by_timestep).all()


def test_every_clip_is_seen_once_and_parts_are_of_one_size():
    batch = {"x": np.arange(CLIPS)}
    parts = [(part["x"], new) for part, new in gap.micro_batches({"w": jnp.zeros(3)}, batch)]
    assert {len(x) for x, _ in parts} == {gap.MICRO_BATCH}
    assert np.concatenate([x[:new] for x, new in parts]).tolist() == list(range(CLIPS))
    (few,) = gap.micro_batches({"w": jnp.zeros(3)}, {"x": np.arange(2)})
    assert few[0]["x"].tolist() == [0, 1] and few[1] == 2
    (full,) = gap.micro_batches({"w": jnp.zeros(3)}, {"x": np.arange(2)}, size=6)
    assert full[0]["x"].tolist() == [0, 1] * 3 and full[1] == 2


def test_batches_go_where_the_parameters_are(params, clips):
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    placed = sharding.put(params, sharding.tree_shardings(params, mesh))
    batch = gap.put_like_params(placed, clips)
    assert batch["latents"].sharding.is_equivalent_to(
        jax.sharding.NamedSharding(mesh, sharding.BATCH), 5
    )
    expected = gap.held_out_losses(params, CFG, clips, SAMPLER, KEY)
    found = gap.held_out_losses(placed, CFG, clips, SAMPLER, KEY)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert gap.put_like_params(params, clips) is clips
