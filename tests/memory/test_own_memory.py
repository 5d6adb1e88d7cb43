"""Memories that live in this file alone: no line of the program knows them."""

import dataclasses
import itertools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import arl2_jax as arl2
from arl2_jax import memory, models
from arl2_jax.config import MEMORY_SETTINGS, MemorySettings, TeacherConfig
from arl2_jax.memory import TrainableMemory
from arl2_jax.models import layer_of
from arl2_jax.nn.attention import attention
from arl2_jax.nn.rope import rotate
from arl2_jax.parameters import ParameterFacts, declare
from arl2_jax.training.pipeline import convert, prepare

declare({"delta/factor": ParameterFacts((None,), decay=False, keep_float32=True)})

SAMPLER = arl2.SamplerConfig(timesteps=(1000.0, 750.0, 500.0))


@dataclasses.dataclass(frozen=True)
class MeanSettings(MemorySettings):
    """Weight of the mean beside the attention inside the block."""

    weight: float = 0.5


@dataclasses.dataclass(frozen=True)
class TrainedMeanSettings(MeanSettings):
    """The same, trained by conversion."""

    converts: ClassVar[bool] = True


def attend_inside(p, grid):
    rope = grid.rotation()
    return attention(rotate(p.q, rope), rotate(p.k, rope), p.v)


class RunningMean(nnx.Module):
    """Softmax inside the block, plus the mean of all values before it times a learned factor."""

    bounded = True
    stacked = False
    gathers = False

    def __init__(self, settings, cfg, *, rngs):
        del rngs
        self.cfg, self.factor = cfg, nnx.Param(jnp.full(cfg.num_heads, settings.weight))

    def init_state(self, batch, room):
        del room
        return jnp.zeros((batch, self.cfg.num_heads, self.cfg.head_dim)), jnp.zeros(batch)

    def attend(self, p, state, grid):
        total, count = state
        mean = total / jnp.maximum(count, 1)[:, None, None]
        return attend_inside(p, grid) + (self.factor[...][:, None] * mean)[:, None], None

    def write(self, p, aux, state, grid):
        del aux, grid
        total, count = state
        return total + jnp.sum(p.v, axis=1), count + p.v.shape[1]

    def attend_clip(self, p, grid, blocks, copies):
        shape = (len(p.v), blocks, p.v.shape[1] // blocks, *p.v.shape[2:])
        fold = lambda x: x.reshape(-1, *shape[2:])
        rope = grid.rotation()
        q, k, v = map(fold, (rotate(p.q, rope), rotate(p.k, rope), p.v))
        sums = jnp.cumsum(p.first_of(copies).v.reshape(-1, *shape[1:]).sum(axis=2), axis=1)
        before = jnp.pad(sums, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
        count = jnp.maximum(shape[2] * jnp.arange(blocks), 1)[:, None, None]
        mean = jnp.repeat(self.factor[...][:, None] * before / count, copies, axis=0)
        return (attention(q, k, v).reshape(shape) + mean[:, :, None]).reshape(p.v.shape), {}


class Counting(nnx.Module):
    """Cannot be trained. Counts passes, sees the text, and shares one decision over its layers."""

    bounded = True
    stacked = False
    gathers = True

    def __init__(self, settings, cfg, *, rngs):
        pass

    def init_state(self, batch, room):
        return {"passes": jnp.zeros(batch), "text": jnp.zeros(batch), "layers": jnp.zeros(batch)}

    def attend(self, p, state, grid):
        return attend_inside(p, grid), {"passes": jnp.ones(len(p.x))}

    def write(self, p, aux, state, grid):
        text = jnp.mean(grid.text, axis=(1, 2, 3))
        return {**state, "passes": state["passes"] + aux["passes"], "text": text}

    def after_block(self, states, grid):
        layers = sum(len(state["passes"]) for state in states)
        return [{**state, "layers": state["layers"] + layers} for state in states]


@pytest.fixture(autouse=True)
def registered():
    memory.register("running_mean", RunningMean, MeanSettings)
    memory.register("trained_mean", RunningMean, TrainedMeanSettings)
    memory.register("counting", Counting)
    yield
    for kind in ("running_mean", "trained_mean", "counting"):
        del memory.MEMORIES[kind], MEMORY_SETTINGS[kind]


@pytest.fixture
def mean(cfg):
    """A running mean, a gated delta state and a window."""
    return dataclasses.replace(
        cfg, hybrid_layers=(1,),
        memories=(
            {"kind": "running_mean", "settings": {"weight": 0.3}, "layers": (0,)},
            {"kind": "window"},
        ),
    )  # fmt: skip


def test_it_generates_and_streams(mean, make_params, error):
    params, key = make_params(mean), jax.random.key(1)
    text = np.random.default_rng(0).standard_normal((1, 4, 8)).astype(np.float32)
    video = arl2.rollout(params, mean, SAMPLER, text, key, blocks=4, shape=(4, 6, 4))
    generator = arl2.Generator(mean, params, SAMPLER, latent_shape=(4, 6, 4))
    blocks = list(itertools.islice(generator.stream(text, key=key), 4))
    assert error(np.concatenate(blocks, axis=1), video) < 1e-4  # two programs, twelve passes
    other = jax.tree.map(lambda x: x, params)
    other["blocks"]["0"]["delta"]["factor"] *= 2
    moved = arl2.rollout(other, mean, SAMPLER, text, key, blocks=4, shape=(4, 6, 4))
    first = slice(None, 2)
    assert error(moved[:, first], video[:, first]) < 1e-6  # nothing is remembered yet
    assert error(moved, video) > 1e-3


def test_its_clip_form_is_its_block_form(
    mean, make_params, make_clip, apply_clip, block_by_block, error
):
    params, clip = make_params(mean), make_clip(mean, blocks=4)
    flow, _ = apply_clip(params, mean, *clip)
    assert error(flow, block_by_block(params, mean, clip)[0]) < 2e-5  # as in test_forms


def test_a_model_of_it_trains(config, tmp_path):
    """As a teacher: the model is what its memories make it, and the factor is trained."""
    model = dataclasses.replace(
        config.model, hybrid_layers=(), memories=({"kind": "running_mean", "layers": (0,)},)
    )
    run = dataclasses.replace(
        config, model=model, phases=("teacher",),
        teacher=TeacherConfig(steps=2, batch_size=8, learning_rate=1e-2, warmup=1),
        train=dataclasses.replace(config.train, workdir=str(tmp_path / "run")),
    )  # fmt: skip
    folder, data, params = prepare(run)
    factor = np.array(layer_of(params, 0)["delta"]["factor"])
    trained = convert(run, folder, data, params).untrained
    assert np.all(np.asarray(layer_of(trained, 0)["delta"]["factor"]) != factor)


def test_it_is_distilled(config, tmp_path):
    """As a conversion: both stages train the factor and leave the teacher."""
    model = dataclasses.replace(
        config.model, hybrid_layers=(), memories=({"kind": "trained_mean", "layers": (1,)},)
    )
    run = dataclasses.replace(
        config, model=model, phases=("stage1", "stage2"),
        stage1=dataclasses.replace(config.stage1, steps=2, start="random"),
        stage2=dataclasses.replace(config.stage2, steps=2, optimizer="adamw"),
        evaluation=dataclasses.replace(config.evaluation, controls=()),
        train=dataclasses.replace(config.train, workdir=str(tmp_path / "run")),
    )  # fmt: skip
    folder, data, params = prepare(run)
    before = jax.tree.map(np.array, params)
    result = convert(run, folder, data, params)
    factors = [layer_of(before, 1)["delta"]["factor"]]
    for stage in (result.stage1, result.stage2):
        factors.append(np.asarray(layer_of(stage, 1)["delta"]["factor"]))
        kernel, wanted = (layer_of(x, 0)["ffn"]["fc1"]["kernel"] for x in (stage, before))
        np.testing.assert_array_equal(kernel, wanted)
    assert not np.array_equal(factors[0], factors[1])
    assert not np.array_equal(factors[1], factors[2])


def test_what_it_gathers_decides_and_sees(cfg, make_params):
    """Aux is summed over all passes of a block; `after_block` sees the layers of all its runs."""
    counting = dataclasses.replace(
        cfg, num_layers=5, hybrid_layers=(1,), memories=({"kind": "counting"},)
    )
    params, text = make_params(counting), np.ones((2, 4, 8), np.float32)
    generator = arl2.Generator(counting, params, SAMPLER, latent_shape=(4, 6, 4))
    context, state = generator._start(generator._params, text, None, jax.random.key(0), frames=None)
    for _ in range(3):
        state, _ = generator._next(context, *state, cfg=counting)
    first, _, last = state.memory
    assert {len(first["passes"]), len(last["passes"])} == {1, 3}
    for run, texts in ((first, context.text[0]), (last, context.text[2])):
        np.testing.assert_array_equal(run["passes"], 3.0 * (3 + 1))  # denoising and clean
        np.testing.assert_array_equal(run["layers"], 3.0 * 4)
        np.testing.assert_allclose(run["text"], np.mean(texts.k, axis=(2, 3, 4)), rtol=1e-5)
    _, written = models.apply(
        params, counting, jnp.zeros((2, 2, 4, 6, 4)), jnp.zeros((2, 2)), jnp.asarray(text),
        memory=models.init_memory(counting, batch=2, frames=None, tokens_per_frame=6), write=True,
    )  # fmt: skip
    np.testing.assert_array_equal(written[0]["passes"], 1.0)


def test_without_a_clip_form_it_cannot_be_trained(config, tmp_path):
    model = dataclasses.replace(config.model, memories=({"kind": "counting"},))
    run = dataclasses.replace(
        config, model=model, train=dataclasses.replace(config.train, workdir=str(tmp_path / "x"))
    )
    with pytest.raises(arl2.ConfigError, match=r"kind=counting in layers \[1\], which has no form"):
        prepare(run)
    assert not (tmp_path / "x").exists()


def test_names_are_taken_once_and_forms_are_recognised(cfg):
    with pytest.raises(ValueError, match="kind='window' is taken by Window"):
        memory.register("window", RunningMean)
    made = RunningMean(MeanSettings(), cfg.attention, rngs=nnx.Rngs(0))
    assert isinstance(made, TrainableMemory)
