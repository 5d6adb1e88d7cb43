"""A memory with a second phase: another state and another program from a latent frame on."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from one_line import assert_one_line

import arl2_jax as arl2
from arl2_jax import memory, models
from arl2_jax.config import MEMORY_SETTINGS, MemorySettings, MemorySpec
from arl2_jax.diffusion import sample
from arl2_jax.errors import ConfigError
from arl2_jax.generation.rollout import rollout
from arl2_jax.memory import Room, SoftmaxCache
from arl2_jax.nn.attention import attention
from arl2_jax.nn.rope import rotate

SAMPLER = arl2.SamplerConfig(timesteps=(1000.0, 500.0))
SHAPE = (4, 6, 4)


@dataclasses.dataclass(frozen=True)
class AbsorbedSettings(MemorySettings):
    """What is kept of the warm-up."""

    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class WarmSettings(AbsorbedSettings):
    """Latent frames of the warm-up."""

    frames: int = 4

    def next_phase(self):
        return self.frames, MemorySpec("absorbed", {"share": self.share})


class Warm(SoftmaxCache):
    """A softmax cache, of which the mean value of each layer is left after the warm-up."""

    def __init__(self, settings, cfg, *, rngs):
        super().__init__(settings, cfg, rngs=rngs)
        self.share = settings.share

    def hand_over(self, states, room):
        del room
        mean = lambda state: self.share * jnp.mean(state.v, axis=2, dtype=jnp.float32)
        return [mean(state) for state in states]


class Absorbed(nnx.Module):
    """Softmax inside the block plus a mean value that never changes."""

    bounded, stacked, gathers = True, False, False

    def __init__(self, settings, cfg, *, rngs):
        self.shape = (cfg.num_heads, cfg.head_dim)

    def init_state(self, batch, room):
        return jnp.zeros((batch, *self.shape))

    def attend(self, p, state, grid):
        rope = grid.rotation()
        return attention(rotate(p.q, rope), rotate(p.k, rope), p.v) + state[:, None], None

    def write(self, p, aux, state, grid):
        return state


@pytest.fixture(autouse=True)
def registered():
    memory.register("warm", Warm, WarmSettings)
    memory.register("absorbed", Absorbed, AbsorbedSettings)
    yield
    for kind in ("warm", "absorbed"):
        del memory.MEMORIES[kind], MEMORY_SETTINGS[kind]


def model(cfg, **settings):
    """Layers 0 and 2 warm up, layer 1 is hybrid."""
    return dataclasses.replace(
        cfg, hybrid_layers=(1,), memories=({"kind": "warm", "settings": settings},)
    )


@pytest.fixture(scope="module")
def text():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 8)), jnp.float32)


def generate(cfg, params, text, blocks, **options):
    generator = arl2.Generator(cfg, params, SAMPLER, latent_shape=SHAPE)
    stream = generator.stream(text, key=jax.random.key(1), **options)
    return np.concatenate(list(itertools.islice(stream, blocks)), axis=1)


def by_definition(cfg, params, text, blocks):
    """Block after block by `apply`, the states of the second phase made by hand."""
    after = dataclasses.replace(cfg, memories=({"kind": "absorbed"},))
    state = models.init_memory(cfg, batch=2, frames=4, tokens_per_frame=6)
    key, found, now = jax.random.key(1), [], cfg
    apply = jax.jit(models.apply, static_argnums=1, static_argnames="write")
    for i in range(blocks):
        if i == 2:
            mean = lambda run: jnp.mean(run.v, axis=2)
            state, now = (mean(state[0]), state[1], mean(state[2])), after
        key, own = jax.random.split(key)
        place = dict(memory=state, position=2 * i)
        flow = lambda x, s, place=place, now=now: apply(
            params, now, x, jnp.full(x.shape[:2], 1000 * s), text, **place
        )[0]
        block = sample(flow, own, (2, 2, *SHAPE), SAMPLER)
        _, state = apply(params, now, block, jnp.zeros((2, 2)), text, **place, write=True)
        found.append(block)
    return np.concatenate(found, axis=1)


def test_states_go_over_at_the_frame(cfg, make_params, text):
    warm = model(cfg)
    params = make_params(warm)
    found = generate(warm, params, text, 4)
    # The same sums in other programs, fed back through four blocks.
    np.testing.assert_allclose(found, by_definition(warm, params, text, 4), rtol=1e-3, atol=1e-4)
    plain = generate(dataclasses.replace(warm, memories=()), params, text, 4, frames=8)
    # The first phase is a softmax cache: the same sums, with a cache of another size.
    np.testing.assert_allclose(found[:, :4], plain[:, :4], rtol=1e-4, atol=1e-5)
    assert np.max(np.abs(found[:, 4:] - plain[:, 4:])) > 1e-2
    other = generate(model(cfg, share=0.0), params, text, 4)
    np.testing.assert_array_equal(found[:, :4], other[:, :4])
    assert np.max(np.abs(found[:, 4:] - other[:, 4:])) > 1e-2


@pytest.mark.parametrize(("past", "guidance"), [(None, 3.0), (2, 1.0), (4, 3.0), (6, 1.0)])
def test_stream_and_rollout_agree(cfg, make_params, text, past, guidance):
    """Also where the past ends before, at and behind the frame."""
    warm, blocks = model(cfg), 3
    params = make_params(warm)
    sampler = arl2.SamplerConfig(method="euler", steps=2, guidance=guidance)
    if past is not None:
        rng = np.random.default_rng(past)
        past = jnp.asarray(rng.standard_normal((2, past, *SHAPE)), jnp.float32)
    generator = arl2.Generator(warm, params, sampler, latent_shape=SHAPE)
    stream = generator.stream(text, key=jax.random.key(1), past=past)
    found = np.concatenate(list(itertools.islice(stream, blocks)), axis=1)
    wanted = rollout(
        params, warm, sampler, text, jax.random.key(1), blocks=blocks, shape=SHAPE, past=past
    )
    # The same sums in other programs, fed back through three blocks.
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_a_short_video_never_leaves_the_first_phase(cfg, make_params, text):
    warm = model(cfg, frames=4)
    params = make_params(warm)
    assert generate(warm, params, text, 9, frames=2).shape[1] == 2
    assert generate(warm, params, text, 9, frames=4).shape[1] == 4


def test_memories_are_those_of_the_phase(cfg):
    """The cache has room for the warm-up alone; the model is bounded."""
    warm = model(cfg)
    (start, first), (frame, second) = warm.phases()
    assert (start, first, frame) == (0, warm, 4)
    assert second.memory_of(0) == MemorySpec("absorbed", {"share": 1.0})
    assert second.memory_of(1) == warm.memory_of(1)
    assert models.unbounded_layers(warm) == ()
    room = dict(batch=2, frames=None, tokens_per_frame=6)
    states = models.init_memory(warm, **room)
    assert states[0].k.shape == (1, 2, 24, 2, 16)
    later = models.hand_over(warm, second, states, frames=None, tokens_per_frame=6)
    assert [jax.tree.leaves(x)[0].shape for x in later] == [
        jax.tree.leaves(x)[0].shape for x in models.init_memory(second, **room)
    ]


def test_phases_follow_one_another(cfg):
    """Two kinds that change at different frames are three phases."""
    both = dataclasses.replace(
        cfg, hybrid_layers=(),
        memories=({"kind": "warm", "settings": {"frames": 8}},
                  {"kind": "warm", "settings": {"frames": 4}, "layers": (1,)}),
    )  # fmt: skip
    kinds = [[at.memory_of(i).kind for i in range(3)] for _, at in both.phases()]
    assert [first for first, _ in both.phases()] == [0, 4, 8]
    assert kinds == [["warm"] * 3, ["warm", "absorbed", "warm"], ["absorbed"] * 3]


@pytest.mark.parametrize("frames", [3, 0, -2])
def test_frames_that_are_no_whole_blocks_are_refused(cfg, frames):
    with pytest.raises(ConfigError) as error:
        model(cfg, frames=frames)
    assert_one_line(error, "kind=warm", f"latent frame {frames}", "model.frames_per_block=2")


def test_it_cannot_be_trained(cfg):
    with pytest.raises(ConfigError) as error:
        models.check_trainable(model(cfg))
    assert_one_line(error, "kind=warm", "[0, 2]", "second phase", "cannot be trained")


def test_states_of_another_shape_are_refused(cfg, monkeypatch):
    warm = model(cfg)
    room = dict(frames=None, tokens_per_frame=6)
    states = models.init_memory(warm, batch=2, **room)
    monkeypatch.setattr(Warm, "hand_over", lambda self, states, room: [s.v for s in states])
    with pytest.raises(ValueError, match="kind='warm' hands over other states"):
        models.hand_over(warm, warm.phases()[1][1], states, **room)


def test_room_of_the_second_phase_is_known(cfg, monkeypatch):
    rooms = []
    monkeypatch.setattr(
        Warm, "hand_over",
        lambda self, states, room: rooms.append(room) or [jnp.zeros((1, 2, 2, 16))] * len(states),
    )  # fmt: skip
    warm = model(cfg)
    states = models.init_memory(warm, batch=2, frames=10, tokens_per_frame=6)
    models.hand_over(warm, warm.phases()[1][1], states, frames=10, tokens_per_frame=6)
    assert rooms == [Room(10, 6, 2)]
