"""Eight CPU devices, and a very small model that the tests share with its compiled functions."""

import gc
import os

# Before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jaxtyping

# Before the packages are imported: calls are checked against annotations, in the rooms whose
# annotations state shapes.
CHECKED = (
    "codecs", "diffusion", "evaluation", "generation", "memory", "models", "nn", "text", "training",
)  # fmt: skip
jaxtyping.install_import_hook([f"arl2_jax.{name}" for name in CHECKED], "contracts.checked")

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax import models
from arl2_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    SamplerConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
    TrainConfig,
)

# The tests compile much and compute little, so they do without most optimisations: compilation,
# which is nearly all of their time, takes a tenth.
QUICK = ["--xla_backend_optimization_level=0"]
if jax.__version__.startswith("0.10."):  # newer ones do not know the flag
    QUICK.append("--xla_cpu_use_fusion_emitters=false")


def pytest_addoption(parser):
    parser.addoption("--full-optimisation", action="store_true", help="compile as users do")


def pytest_configure(config):
    """Set XLA's flags, which it reads when the first program is compiled."""
    flags = [] if config.getoption("full_optimisation") else QUICK
    devices = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = " ".join([*flags, os.environ.get("XLA_FLAGS", ""), devices])


class Clip(NamedTuple):
    """Arguments of `apply_clip` after the model."""

    clean: Any
    noisy: Any
    timestep: Any
    text: Any


def random_params(cfg: ModelConfig, seed: int = 0):
    """Parameters at which nothing is trivially zero, one or the identity.

    Initial values hide much: the head and the low-rank updates predict zero.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name, noise = path[-1].key, rng.standard_normal(leaf.shape)
        if name == "kernel":
            value = noise * leaf.shape[0] ** -0.5
        elif name.startswith("phi"):
            value = np.eye(leaf.shape[-1]) + 0.1 * noise
        elif name == "scale":
            value = 1 + 0.2 * noise
        elif name == "dt_bias":  # steps of about 0.1 a token: blocks are neither kept nor lost
            value = noise / 2 - 2
        else:
            value = 0.3 * noise
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, models.param_shapes(cfg))


def random_clip(cfg: ModelConfig, *, blocks=3, rows=4, columns=6, batch=2, seed=0) -> Clip:
    """A clip whose two halves are unrelated, so that neither can stand in for the other."""
    rng = np.random.default_rng(seed)
    frames = blocks * cfg.frames_per_block
    latents = rng.standard_normal((2, batch, frames, rows, columns, cfg.in_dim), np.float32)
    levels = rng.uniform(100, 1000, (batch, blocks)).repeat(cfg.frames_per_block, axis=1)
    text = rng.standard_normal((batch, cfg.text_len, cfg.text_dim), np.float32)
    return Clip(*(jnp.asarray(x, jnp.float32) for x in (*latents, levels, text)))


def relative_error(x, wanted) -> float:
    """Root mean square of the difference over that of what is wanted, in float64."""
    x, wanted = (np.asarray(y, np.float64) for y in (x, wanted))
    return float(np.sqrt(np.mean((x - wanted) ** 2) / np.mean(wanted**2)))


@pytest.fixture(scope="module", autouse=True)
def unload_programs():
    """Unload compiled programs before they fill the memory map of the process.

    Each takes some mappings, and Linux allows a process 65,530: XLA crashes where it gets none.
    """
    yield
    maps, limit = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")
    if maps.exists() and len(maps.read_bytes().splitlines()) > int(limit.read_text()) // 4:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def unchecked(monkeypatch):
    """Let calls with misfit arguments pass the annotations, up to the errors that users see."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def make_params():
    return random_params


@pytest.fixture(scope="session")
def make_clip():
    return random_clip


@pytest.fixture(scope="session")
def error():
    return relative_error


@pytest.fixture(scope="session")
def cfg():
    """Two layers with the gated delta memory and one with the softmax cache."""
    return ModelConfig(
        dim=32, ffn_dim=48, num_heads=2, num_layers=3, freq_dim=16, text_dim=8, text_len=4,
        in_dim=4, out_dim=4, hybrid_layers=(0, 1), frames_per_block=2, lora_rank=4, lora_alpha=8.0,
    )  # fmt: skip


@pytest.fixture(scope="session")
def params(cfg):
    return random_params(cfg)


@pytest.fixture(scope="session")
def clip(cfg):
    return random_clip(cfg)


@pytest.fixture(scope="session")
def apply():
    return jax.jit(models.apply, static_argnums=1, static_argnames="write")


@pytest.fixture(scope="session")
def apply_clip():
    return jax.jit(models.apply_clip, static_argnums=1)


@pytest.fixture(scope="session")
def block_by_block(apply):
    """`apply` over the blocks of a clip, each clean one written: (flow, memory after the last)."""

    def run(params, cfg, clip: Clip):
        f, (batch, frames, rows, columns, _) = cfg.frames_per_block, clip.clean.shape
        tokens = rows * columns // (cfg.patch_size[1] * cfg.patch_size[2])
        memory = models.init_memory(cfg, batch=batch, frames=frames, tokens_per_frame=tokens)
        flows = []
        for first in range(0, frames, f):
            clean, noisy, timestep = (x[:, first : first + f] for x in clip[:3])
            now = dict(memory=memory, position=jnp.int32(first))
            flows.append(apply(params, cfg, noisy, timestep, clip.text, **now)[0])
            _, memory = apply(params, cfg, clean, timestep * 0, clip.text, **now, write=True)
        return jnp.concatenate(flows, axis=1), memory

    return run


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """A run on sprite videos of 2 blocks, short enough to be trained in every test."""
    phase = dict(steps=6, batch_size=8, learning_rate=1e-3, warmup=2, ema_decay=0.9)
    return Config(
        ModelConfig(
            dim=16, ffn_dim=24, num_heads=2, num_layers=2, freq_dim=8, text_dim=8, text_len=4,
            in_dim=12, out_dim=12, hybrid_layers=(0,), frames_per_block=2, lora_rank=2,
        ),
        SamplerConfig(timesteps=(1000.0, 500.0)),
        DataConfig(frames=4, height=12, width=32, held_out=8),
        teacher=TeacherConfig(**phase),
        stage1=Stage1Config(**phase),
        stage2=Stage2Config(**phase, layer_loss=0.5, optimizer="muon"),
        train=TrainConfig(
            workdir=str(tmp_path_factory.mktemp("runs") / "run"), log_every=1, checkpoint_every=2
        ),
        evaluation=EvaluationConfig(clips=2, recall_clips=0, rollout_clips=0),
    )  # fmt: skip
