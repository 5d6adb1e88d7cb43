"""A step is the same for any split of its batch, over micro-batches or devices."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arl2_jax import sharding
from arl2_jax.config import MeshConfig
from arl2_jax.models import init_stacked, stack_params, without_delta
from arl2_jax.training.loop import phase_model
from arl2_jax.training.losses import NoisedClip
from arl2_jax.training.partition import TRAINED, split_params
from arl2_jax.training.step import accumulate, init_state, make_step

PHASES = ("teacher", "stage1", "stage2")
MESHES = {
    "data": MeshConfig(data=8),
    "all_axes": MeshConfig(data=1, fsdp=2, tensor=2, context=2),
    "context": MeshConfig(data=2, context=4),
}


@pytest.fixture(scope="module")
def params(config, make_params):
    return make_params(config.model)


def make_batch(config, frames):
    rng = np.random.default_rng(0)
    rows, columns, channels = 2, 6, config.model.in_dim
    return {
        "latents": rng.standard_normal((8, frames, rows, columns, channels), np.float32),
        "text": rng.standard_normal((8, 4, 8), np.float32),
    }


@pytest.fixture(scope="module")
def batch(config):
    return make_batch(config, 4)


@pytest.fixture(scope="module")
def start(config, params):
    """A phase's state before its first step, and its frozen parameters."""

    @functools.cache
    def make(phase):
        whole = without_delta(params) if phase == "teacher" else params
        stacked = stack_params(whole, phase_model(config, phase))
        trained, frozen = split_params(stacked, TRAINED[phase])
        return init_state(config, phase, trained, jax.random.key(5)), frozen

    return make


@pytest.fixture(scope="module")
def run(config, start):
    """One step of a phase: (state, metrics)."""

    @functools.cache
    def step(phase, accumulation=1, mesh=None, frames=4):
        changed = dataclasses.replace(getattr(config, phase), accumulation=accumulation)
        one = jax.jit(make_step(dataclasses.replace(config, **{phase: changed}), phase))
        state, frozen = start(phase)
        batch = make_batch(config, frames)
        if mesh is None:
            return one(state, frozen, batch)
        mesh = sharding.make_mesh(MESHES[mesh])
        place = lambda tree: sharding.put(tree, sharding.tree_shardings(tree, mesh))
        with jax.set_mesh(mesh):
            return one(place(state), place(frozen), sharding.put_batch(batch, mesh))

    return step


def assert_same_step(found, wanted, start, error, *, ignore=()):
    """Gradients agree leaf by leaf, and the parameters' change as a whole.

    Adam divides each gradient by its own size, and Muon each singular value, so where one is all
    rounding its sign may differ.
    """
    (state, metrics), (wanted_state, wanted_metrics) = found, wanted
    assert metrics.keys() == wanted_metrics.keys()
    for name in metrics:
        if not name.endswith(tuple(ignore)):
            values = metrics[name], wanted_metrics[name]
            np.testing.assert_allclose(*values, rtol=1e-4, atol=1e-6, err_msg=name)
    first = lambda s: [mu for _, mu in optax.tree.get_all_with_path(s.opt_state, "mu")]
    found_moments = jax.tree_util.tree_leaves_with_path(first(state))
    wanted_moments = jax.tree.leaves(first(wanted_state))
    for (path, moment), wanted_moment in zip(found_moments, wanted_moments, strict=True):
        # Sums over clips in another order, in float32.
        assert error(moment, wanted_moment) < 1e-4, jax.tree_util.keystr(path)
    change = lambda end: np.concatenate(
        [np.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (end, start)), strict=True)]
    )
    assert error(change(jax.device_get(state.params)), change(wanted_state.params)) < 1e-2


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("teacher", marks=pytest.mark.slow),
        "stage1",
        pytest.param("stage2", marks=pytest.mark.slow),
    ],
)
def test_accumulation_is_one_large_batch(run, start, error, phase):
    # Roots of mean squares are averaged over micro-batches, which is not the root of the mean.
    roots = ("rms", "memory_to_local")
    assert_same_step(run(phase, 4), run(phase), start(phase)[0].params, error, ignore=roots)


@pytest.mark.parametrize("mesh", [pytest.param("data", marks=pytest.mark.slow), "all_axes"])
@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("teacher", marks=pytest.mark.slow),
        "stage1",
        pytest.param("stage2", marks=pytest.mark.slow),
    ],
)
def test_eight_devices_are_one(run, start, error, phase, mesh):
    found = run(phase, mesh=mesh)
    assert_same_step(found, run(phase), start(phase)[0].params, error)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(found[0].params))


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["stage1", "stage2"])
def test_a_clip_over_four_devices_is_one(run, start, error, phase):
    """One block a device, so that states come from up to three devices before."""
    found = run(phase, mesh="context", frames=8)
    assert_same_step(found, run(phase, frames=8), start(phase)[0].params, error)


def test_parameters_stay_sharded(run, config):
    state, _ = run("teacher", mesh="all_axes")
    layout = sharding.tree_shardings(state, sharding.make_mesh(MESHES["all_axes"]))
    kernel = lambda tree: tree["blocks"]["0-1"]["self_attn"]["q"]["kernel"]
    for tree, wanted in ((state.params, layout.params), (state.ema, layout.ema)):
        assert kernel(tree).sharding.is_equivalent_to(kernel(wanted), 3)
        assert kernel(tree).addressable_shards[0].data.shape == (2, 8, 8)


def test_micro_batches_keep_the_clips_of_each_device(unchecked):
    """Every parts-th clip: consecutive ones would all be on one device."""
    clip = NoisedClip(*([jnp.arange(8.0)] * 5))
    seen = lambda micro: ({"w": jnp.sum(micro.s * 10.0 ** jnp.arange(4))}, {})
    grads, _ = accumulate(seen, clip, 2)
    assert grads["w"] == ((0 + 20 + 400 + 6000) + (1 + 30 + 500 + 7000)) / 2


@pytest.mark.parametrize("phase", PHASES)
def test_loss_falls_on_a_batch(run, config, start, batch, phase):
    settings = dataclasses.replace(getattr(config, phase), learning_rate=1e-2, steps=40, warmup=0)
    changed = dataclasses.replace(config, **{phase: settings})
    step, frozen = make_step(changed, phase), start(phase)[1]

    @jax.jit
    def train(state, batch):
        # The same noise at every step, so that the losses can be compared.
        again = lambda s, _: step(s._replace(key=state.key), frozen, batch)
        return jax.lax.scan(again, state, length=40)

    state, metrics = train(start(phase)[0], batch)
    losses = metrics["loss"]
    assert losses[-1] < 0.8 * losses[0]
    assert np.all(np.isfinite(losses)) and int(state.step) == 40
    # An average with the settings' decay at most, and a shorter memory at the start.
    np.testing.assert_allclose(metrics["learning_rate"][0], 1e-2, rtol=1e-6)


def test_average_follows_its_formula(config, start, batch):
    step = jax.jit(make_step(config, "stage1"))
    state, frozen = start("stage1")
    wanted = state.params
    for i in range(12):
        state, _ = step(state, frozen, batch)
        decay = min(config.stage1.ema_decay, (1 + i) / (10 + i))
        wanted = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * p, wanted, state.params)
    chex.assert_trees_all_close(state.ema, wanted, rtol=1e-5, atol=1e-6)


def test_every_step_draws_its_own_noise(config, start, batch):
    settings = dataclasses.replace(config.stage1, learning_rate=1e-30)
    step = jax.jit(make_step(dataclasses.replace(config, stage1=settings), "stage1"))
    state, frozen = start("stage1")
    state, first = step(state, frozen, batch)
    _, second = step(state, frozen, batch)
    assert first["loss"] != second["loss"]


def test_dropped_text_is_zero_text(config, start, batch, params):
    """With all text dropped the text has no influence; with none dropped it has."""
    losses = {}
    for dropout in (0.0, 1.0):
        teacher = dataclasses.replace(config.teacher, text_dropout=dropout)
        step = jax.jit(make_step(dataclasses.replace(config, teacher=teacher), "teacher"))
        state, frozen = start("teacher")
        for name in ("given", "other"):
            text = batch["text"] * (1 if name == "given" else -1)
            losses[dropout, name] = step(state, frozen, batch | {"text": text})[1]["loss"]
    assert losses[1.0, "given"] == losses[1.0, "other"]
    assert losses[0.0, "given"] != losses[0.0, "other"]


def test_self_rollout_has_a_generated_past(config, start, batch):
    """With self-rollout the data's latents have no influence, and no gradient reaches the past."""
    step = jax.jit(make_step(config, "stage2", self_rollout=True))
    state, frozen = start("stage2")
    rows, columns, channels = config.latent_shape
    latents = np.zeros((2, 4, rows, columns, channels), np.float32)
    arguments = lambda x: (state, frozen, {"latents": x, "text": batch["text"][:2]})
    after, metrics = step(*arguments(latents))
    other, _ = step(*arguments(latents + 1))
    assert np.isfinite(metrics["loss"]) and metrics["loss"] > 0
    chex.assert_trees_all_equal(after.params, other.params)
    assert optax.tree.norm(optax.tree.sub(after.params, state.params)) > 0


@pytest.mark.parametrize("phase", PHASES)
def test_program_does_not_grow_with_depth(config, phase):
    """The lowered programs of 8 and of 30 layers loop over layers and over stacked arrays."""

    def size(layers):
        hybrid = tuple(range(layers // 2))
        model = dataclasses.replace(config.model, num_layers=layers, hybrid_layers=hybrid)
        run = dataclasses.replace(config, model=model)
        state, frozen = jax.eval_shape(functools.partial(begin, run), jax.random.key(0))
        return len(
            jax.jit(make_step(run, phase)).lower(state, frozen, make_batch(run, 4)).as_text()
        )

    def begin(run, key):
        params = init_stacked(phase_model(run, phase), key)
        trained, frozen = split_params(params, TRAINED[phase])
        return init_state(run, phase, trained, key), frozen

    assert size(30) < 1.02 * size(8)  # numbers in it have more digits
