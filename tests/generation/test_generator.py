"""The generator streams the blocks of `rollout` from one compiled program."""

import dataclasses
import functools
import itertools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arl2_jax as arl2
from arl2_jax.codecs import SpaceToDepth
from arl2_jax.generation import generator as module

SHAPE = (4, 6, 12)
SAMPLER = arl2.SamplerConfig(timesteps=(1000.0, 500.0))
HYBRID = arl2.ModelConfig.tiny(
    dim=32, ffn_dim=32, num_heads=2, num_layers=2, hybrid_layers=(0, 1), freq_dim=8, text_dim=8,
    text_len=4, lora_rank=2,
)  # fmt: skip
MIXED = dataclasses.replace(HYBRID, hybrid_layers=(0,))


@functools.cache
def make_params(cfg):
    """Random parameters, quickly; the head, zero at the start, is random as well."""
    rng = np.random.default_rng(0)
    draw = lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(draw, arl2.param_shapes(cfg))


def make_key(seed):
    """Quick to compile on a CPU."""
    return jax.random.key(seed, impl="rbg")


def make_text(batch=2):
    shape = (batch, HYBRID.text_len, HYBRID.text_dim)
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def make_generator(cfg=HYBRID, sampler=SAMPLER, **options):
    return arl2.Generator(cfg, make_params(cfg), sampler, latent_shape=SHAPE, **options)


@pytest.fixture
def traces(monkeypatch):
    """Counts how often a program that generates is traced."""
    calls = []
    real = module.generate_block
    monkeypatch.setattr(module, "generate_block", lambda *a: calls.append(1) or real(*a))
    return calls


GUIDED = arl2.SamplerConfig(method="euler", steps=2, guidance=3.0)
NOISY = dataclasses.replace(GUIDED, context_noise=0.3)


@pytest.mark.parametrize(
    ("cfg", "sampler"),
    [(HYBRID, SAMPLER), pytest.param(MIXED, GUIDED, marks=pytest.mark.slow), (MIXED, NOISY)],
    ids=["hybrid", "mixed, guided", "noisy writes"],
)
def test_stream_equals_rollout(cfg, sampler):
    key, text = make_key(3), make_text()
    past = np.random.default_rng(4).standard_normal((2, 4, *SHAPE)).astype(np.float32)
    expected = arl2.rollout(
        make_params(cfg), cfg, sampler, text, key, blocks=3, shape=SHAPE, past=past
    )
    video = make_generator(cfg, sampler).generate(text, frames=6, key=key, past=past)
    assert video.shape == (2, 6, *SHAPE)
    np.testing.assert_allclose(video, expected, rtol=1e-4, atol=1e-4)
    jax.random.split(key)  # is still usable


def test_endless_stream_compiles_once(traces):
    generator = make_generator()
    stream = generator.stream(make_text(1)[0], key=make_key(5))
    blocks = list(itertools.islice(stream, 12))
    again = next(generator.stream(make_text(1), key=make_key(5), frames=2))
    assert len(traces) == 1
    assert all(block.shape == (1, 2, *SHAPE) for block in blocks)
    np.testing.assert_array_equal(again, blocks[0])


def test_codec_gives_pixels():
    codec, options = SpaceToDepth(2, 12), {"frames": 4, "key": make_key(5)}
    latents = make_generator().generate(make_text(1), **options)
    pixels = make_generator(codec=codec).generate(make_text(1), **options)
    expected = np.clip(np.rint((codec.decode(latents) + 1) * 127.5), 0, 255)
    assert pixels.dtype == np.uint8 and pixels.shape == (1, 4, 8, 12, 3)
    assert np.abs(pixels - expected).max() <= 1


def test_capacity_is_spent_and_shared(traces):
    generator = make_generator(MIXED)
    stream = generator.stream(make_text(), key=make_key(7), capacity=5)
    assert len(list(itertools.islice(stream, 2))) == 2
    with pytest.raises(ValueError, match="capacity=5 latent frames are used up"):
        next(stream)
    for frames in (2, 4):
        generator.generate(make_text(), frames=frames, key=make_key(5), capacity=5)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "frames and capacity are both None, but 1 of 2 layers"),
        ({"frames": 3}, "frames=3 must be a positive multiple of 2"),
        ({"frames": 8, "capacity": 6}, "capacity=6 is less than the 8 latent frames"),
        ({"capacity": 1}, "capacity=1 is less than the 2"),
        ({"frames": 2, "past": jnp.zeros((2, 3, *SHAPE))}, "past has shape"),
        ({"frames": 2, "past": jnp.zeros((1, 2, *SHAPE))}, "past has shape"),
        ({"frames": 2, "text_embedding": jnp.zeros((4, 9))}, "text_embedding has shape"),
    ],
)
def test_errors_come_before_compilation(options, message, traces):
    options = {"text_embedding": make_text(), "key": make_key(0)} | options
    with pytest.raises(ValueError, match=message):
        make_generator(MIXED).stream(**options)
    assert not traces


def test_latents_must_fit_the_model():
    with pytest.raises(ValueError, match="latent_shape"):
        arl2.Generator(HYBRID, make_params(HYBRID), SAMPLER, latent_shape=(4, 5, 12))


def test_public_face_is_lazy_and_complete():
    code = "import sys, arl2_jax; assert 'jax' not in sys.modules; arl2_jax.ModelConfig.tiny(); "
    code += "assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert all(getattr(arl2, name) is not None for name in arl2.__all__)
    assert set(arl2.__all__) <= set(dir(arl2))
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = arl2.missing  # pyright: ignore[reportAttributeAccessIssue]


WINDOWS = {"kind": "window", "settings": {"sink": 3, "frames": 9}, "layers": (1, 2)}


def test_windows_and_states_stream_in_flat_memory():
    """300 blocks, without frames or capacity; what is alive after 20 is alive after 300."""
    cfg = dataclasses.replace(HYBRID, num_layers=4, hybrid_layers=(0, 3), memories=(WINDOWS,))
    stream = make_generator(cfg).stream(make_text(1), key=make_key(5))
    alive = lambda: sum(x.nbytes for x in jax.live_arrays())
    blocks = itertools.islice(stream, 300)
    for _ in range(20):
        block = next(blocks)
    before = alive()
    last = functools.reduce(lambda _, block: block, blocks)
    del block
    assert alive() == before
    assert np.all(np.isfinite(last)) and np.abs(last).max() < 1e3


def test_no_pass_copies_a_cache():
    """In the text of the compiled block only the block's write produces a whole cache."""
    cfg = dataclasses.replace(HYBRID, num_layers=5, hybrid_layers=(0,), memories=(WINDOWS,))
    generator = make_generator(cfg)
    context, state = generator._start(generator._params, make_text(1), None, make_key(0), frames=50)
    k, _ = state.memory[-1]
    assert k.shape == (2, 1, 50 * 6, 2, 16)
    text = generator._next.lower(context, *state, cfg=cfg).compile().as_text()
    shape = re.escape(f"f32[{','.join(map(str, k.shape))}]")
    makers = set(re.findall(rf"= {shape}\S* ([\w-]+)\(", text))
    assert makers & {"dynamic-update-slice", "fusion"}
    passed_on = {"parameter", "get-tuple-element", "bitcast", "while", "tuple"}
    assert makers - passed_on <= {"dynamic-update-slice", "fusion"}
