"""The least-squares fit: exact where linear, never worse, and kept for a resumed run."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import traverse_util
from one_line import assert_one_line

from arl2_jax import sharding
from arl2_jax.config import (
    MeshConfig,
    SamplerConfig,
    Stage1Config,
    from_config_dict,
    to_config_dict,
)
from arl2_jax.errors import ConfigError, WeightsError
from arl2_jax.models import init_stacked, layer_of
from arl2_jax.nn.rope import video_rope
from arl2_jax.training import closed_form, losses, start
from arl2_jax.training.closed_form import Readings, Readout
from arl2_jax.training.start import least_squares_start, start_stage1

HEADS, WIDTH = 2, 6


@pytest.fixture(scope="module")
def layer():
    """A layer that reads random states, its readout and Wo."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    clips, blocks, tokens, width = 4, 3, 8, HEADS * WIDTH
    total = blocks * tokens
    readings = Readings(
        q=draw(2 * clips, total, HEADS, WIDTH),
        states=draw(clips, blocks, HEADS, WIDTH, WIDTH).at[:, 0].set(0.0),
        x=draw(2 * clips, total, width),
        target=draw(2 * clips, total, HEADS, WIDTH),
        weights=jnp.asarray(rng.uniform(0.5, 2, 2 * clips), jnp.float32),
        rope=video_rope(0, blocks, 2, 4, WIDTH),
    )
    identity = jnp.tile(jnp.eye(WIDTH), (HEADS, 1, 1))
    readout = Readout(
        identity + 0.3 * draw(HEADS, WIDTH, WIDTH), identity, 0.3 * draw(HEADS, width, 1)
    )
    return readings, readout, draw(width, width) / width**0.5


def with_target(readings, readout):
    """The same readings, whose target is what a readout reads."""
    features, _ = closed_form._gated_reads(readout, readings)
    return readings._replace(target=jnp.einsum("bnhd,hde->bnhe", features, readout.phi_v))


def test_a_linear_map_of_the_read_is_found(layer, error):
    readings, readout, output = layer
    wanted = jax.random.normal(jax.random.key(1), readout.phi_v.shape)
    readings = with_target(readings, readout._replace(phi_v=wanted))
    sums = closed_form.value_sums(readout, readings)
    found = closed_form.solve_values(sums, output, readout.phi_v, ridge=1e-8)
    # float32 normal equations: conditions near 1e3 leave four digits.
    assert error(found, wanted) < 1e-3
    # The ridge pulls towards the start, not towards zero.
    near = closed_form.solve_values(sums, output, readout.phi_v, ridge=1e6)
    assert error(near, readout.phi_v) < 1e-3


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
def test_values_never_raise_the_error(layer, ridge):
    """Nor does a second solution from the first, which is at a minimum if the ridge is small."""
    readings, readout, output = layer
    errors = [closed_form.squared_error(readout, readings, output)]
    for _ in range(2):
        sums = closed_form.value_sums(readout, readings)
        phi_v = closed_form.solve_values(sums, output, readout.phi_v, ridge=ridge)
        readout = readout._replace(phi_v=phi_v)
        errors.append(closed_form.squared_error(readout, readings, output))
    assert errors[1] < errors[0] and errors[2] < errors[1] * (1 + 1e-6)  # rounding of the sums
    gradient = jax.grad(closed_form.squared_error)(readout, readings, output).phi_v
    if ridge < 1e-3:
        first = jax.grad(closed_form.squared_error)(layer[1], readings, output).phi_v
        assert jnp.linalg.norm(gradient) < 1e-3 * jnp.linalg.norm(first)


def test_gradient_and_curvature_are_those_of_the_error(layer, error):
    readings, readout, output = layer
    key = jax.random.key(0)
    gradient, factors = start._curvature(readout, readings, output, key)
    wanted = jax.grad(closed_form.squared_error)(readout, readings, output)
    for found, twice in zip(gradient, wanted, strict=True):
        assert error(2 * found, twice) < 1e-5
    jacobian = jax.jit(jax.jacfwd(closed_form._residual))(readout, readings, output)
    flat = jnp.concatenate([j.reshape(readings.x.size, -1) for j in jacobian], axis=1)
    direction = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), readout)
    whole = lambda tree: jnp.concatenate([x.ravel() for x in tree])
    found = start._curvature_times(readout, readings, output, direction)
    assert error(whole(found), flat.T @ (flat @ whole(direction))) < 1e-4
    # The trace of a factored curvature is that of the curvature, within what probes scatter.
    for j, factor, matrix in zip(jacobian, factors, readout, strict=True):
        true = jnp.sum(jnp.square(j.reshape(-1, HEADS, matrix[0].size)), axis=(0, 2))
        assert error(jnp.trace(factor.inputs, axis1=1, axis2=2), true) < 0.25


def test_newton_steps_find_a_readout_that_fits(layer):
    """From nearby: a target that another readout reads is met within a few steps."""
    readings, readout, output = layer
    near = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size)).reshape(x.shape), readout)
    readings = with_target(readings, near)
    error = before = float(closed_form.squared_error(readout, readings, output))
    for turn in range(6):
        key = jax.random.key(turn)
        gradient, factors = start._curvature(readout, readings, output, key)
        at = readout
        multiply = lambda d, at=at: start._curvature_times(at, readings, output, d)
        step = closed_form.newton_step(gradient, factors, multiply)
        along = start._errors_along(readout, readings, output, step)
        readout, lower = closed_form.take_step(readout, step, error, along.tolist())
        assert lower <= error
        error = lower
    assert error < 0.02 * before


def noised(cfg, clip, key=0, sampler=SamplerConfig(shift=5.0)):
    noise = jax.jit(losses.noise_clip, static_argnums=(1, 4))
    return noise(jax.random.key(key), cfg, clip.clean, clip.text, sampler)


@pytest.fixture(scope="module")
def fitted(cfg, params, make_clip):
    batches = [noised(cfg, make_clip(cfg, seed=i), i) for i in range(2)]
    return batches, *least_squares_start(params, cfg, batches, jax.random.key(0))


def test_errors_are_those_of_stage_one_and_fall(cfg, params, fitted):
    batches, after, errors = fitted
    distill = jax.jit(losses.distill_layers, static_argnums=1)
    for name, tree in (("before", params), ("after", after)):
        found = [distill(tree, cfg, batch).errors for batch in batches]
        for layer in ("0", "1"):
            wanted = np.mean([each[layer] for each in found])
            # The same sums in another order.
            np.testing.assert_allclose(getattr(errors[layer], name), wanted, rtol=1e-4)
    assert all(each.after < 0.8 * each.before for each in errors.values())


def test_nothing_but_the_readout_changes(params, fitted):
    flat = lambda tree: traverse_util.flatten_dict(tree, sep="/")
    before, after = flat(params), flat(fitted[1])
    assert before.keys() == after.keys()
    moved = {path for path in before if np.any(before[path] != after[path])}
    names = ("phi_q", "phi_v", "gate_proj/kernel")
    assert moved == {f"blocks/{i}/delta/{name}" for i in (0, 1) for name in names}
    assert all(after[path].dtype == before[path].dtype for path in before)


@pytest.mark.slow
def test_the_fit_is_sharded(cfg, params, make_clip, error, monkeypatch):
    monkeypatch.setattr(start, "ROUNDS", 1)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=1, tensor=2, context=2))
    batch = noised(cfg, make_clip(cfg, blocks=2, batch=8))
    key = jax.random.key(0)
    alone, errors = least_squares_start(params, cfg, [batch], key)
    placed = sharding.put(params, sharding.tree_shardings(params, mesh))
    by_clip = jax.NamedSharding(mesh, sharding.BATCH)
    shared = jax.tree.map(lambda x: jax.device_put(x, by_clip), batch)
    found, theirs = least_squares_start(placed, cfg, [shared], key)
    for i in ("0", "1"):
        # Sums in another order, in float32, of which inverses are taken.
        np.testing.assert_allclose(theirs[i].after, errors[i].after, rtol=1e-3)
        for name in ("phi_q", "phi_v"):
            one, other = (tree["blocks"][i]["delta"][name] for tree in (alone, found))
            assert error(other, one) < 1e-2, (i, name)
            assert other.sharding == placed["blocks"][i]["delta"][name].sharding


class Batches:
    """Training clips that count how often they are opened."""

    def __init__(self, make_clip, cfg):
        self.clip, self.opened = make_clip(cfg, blocks=2), 0

    def train_batches(self, size, seed):
        self.opened += 1
        clean, text = (np.resize(x, (size, *x.shape[1:])) for x in (self.clip[0], self.clip[3]))
        yield from [{"latents": clean, "text": text}] * 2


@pytest.mark.slow
def test_a_resumed_run_starts_from_the_same_fit(config, make_clip, tmp_path, unchecked):
    stage1 = dataclasses.replace(config.stage1, start="least_squares", start_clips=16)
    config = dataclasses.replace(config, stage1=stage1)
    mesh = sharding.make_mesh(MeshConfig(data=8))
    params = sharding.jit_on(mesh, lambda key: init_stacked(config.model, key))(jax.random.key(0))
    data, folder = Batches(make_clip, config.model), epath.Path(tmp_path)
    first, again = (start_stage1(config, params, data, mesh, folder) for _ in range(2))
    assert data.opened == 1
    assert jax.tree.structure(first) == jax.tree.structure(again)
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == other.sharding
    facts = json.loads((tmp_path / "start.json").read_text())
    assert facts["clips"] == 16 and facts["errors"]["0"]["after"] <= facts["errors"]["0"]["before"]
    value = lambda tree: layer_of(tree, 0)["delta"]["phi_v"]
    assert np.any(value(first) != value(params))
    other = params | {"head": jax.tree.map(lambda x: x + 1, params["head"])}
    with pytest.raises(WeightsError) as error:
        start_stage1(config, other, data, mesh, folder)
    assert_one_line(
        error, folder / "start", "other frozen weights", "put the teacher's weights back"
    )
    plain = dataclasses.replace(config, stage1=dataclasses.replace(stage1, start="random"))
    assert start_stage1(plain, params, data, mesh, folder) is params


def test_settings_that_do_not_fit_are_refused(config):
    with pytest.raises(ConfigError, match=r"stage1\.start_clips=12 must be a multiple of the 8"):
        Stage1Config(start="least_squares", start_clips=12, batch_size=8)
    Stage1Config(start_clips=12, batch_size=8)  # not used
    with pytest.raises(ConfigError, match=r"stage1\.start_clips=0 must be positive"):
        Stage1Config(start_clips=0)
    stage1 = dataclasses.replace(config.stage1, start="least_squares")
    config = dataclasses.replace(config, stage1=stage1)
    tree = to_config_dict(config)
    assert from_config_dict(tree) == config
    for field, value in (("memory_gate", "local"), ("delta", {"read": "token"})):
        changed = tree | {"model": tree["model"] | {field: value}}
        with pytest.raises(ConfigError, match=r"stage1\.start=least_squares fits") as caught:
            from_config_dict(changed)
        assert "\n" not in str(caught.value)
    tree["stage1"]["start"] = "closed"
    with pytest.raises(ConfigError, match=r"stage1\.start=closed must be one of random, least"):
        from_config_dict(tree)
