"""Checkpoints are restored as they were saved, also after kills and damage."""

import contextlib
import dataclasses
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from one_line import assert_one_line

from arl2_jax.errors import ConfigError, StorageError
from arl2_jax.training.checkpoint import Checkpointer

ROOT = Path(__file__).parents[2]
FINGERPRINT = {"model": {"dim": 128, "hybrid_layers": (0, 1)}}


class Memory(NamedTuple):
    state: Any
    count: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Noise:
    key: Any
    scale: Any


def train_state(seed=0):
    weights = np.random.RandomState(seed).randn(16, 8).astype(np.float32)
    params = {
        "blocks": {"0": {"q": {"kernel": jnp.asarray(weights), "bias": jnp.zeros(8)}}},
        "half": jnp.asarray(weights[0], jnp.bfloat16),
    }
    return {
        "params": params,
        "optimizer": optax.adamw(1e-3).init(params),
        "memory": Memory(state=jnp.ones((2, 3)), count=jnp.int32(seed)),
        "noise": Noise(key=jax.random.key(seed), scale=jnp.float32(0.5)),
        "keys": jax.random.split(jax.random.key(seed + 1), 8),
        "host": np.arange(3, dtype=np.int64),
        "epoch": 7,
        "nothing": None,
    }


def small_state(step):
    return {"w": jnp.full((64,), step, jnp.float32), "step": jnp.int32(step)}


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(a) is type(b)
        if hasattr(b, "dtype"):
            assert a.dtype == b.dtype
            if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
                a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def open_folder(folder, keep=2, fingerprint=FINGERPRINT):
    return Checkpointer(folder, keep=keep, fingerprint=fingerprint)


def fill(folder, *steps, keep=2):
    with open_folder(folder, keep=keep) as checkpointer:
        for step in steps:
            checkpointer.save(step, small_state(step), {"position": step})


def run(code, *args, devices=1, **options):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, env=environment, text=True, **options)


@pytest.mark.parametrize("data_state", [{"position": [1, 2]}, b"\x00\xffgrain", None])
def test_what_was_saved_comes_back(tmp_path, data_state):
    state = train_state()
    with open_folder(tmp_path / "new" / "folder") as checkpointer:
        assert checkpointer.latest_step() is None
        checkpointer.save(3, state, data_state)
        checkpointer.wait()
        assert checkpointer.latest_step() == 3
        found, position = checkpointer.restore(train_state(seed=5))
    assert_same(found, state)
    assert position == data_state


def test_keys_continue_the_same_random_stream(tmp_path):
    state = {"key": jax.random.key(3, impl="rbg")}
    with open_folder(tmp_path) as checkpointer:
        checkpointer.save(1, state, None)
        checkpointer.wait()
        abstract = jax.eval_shape(lambda: {"key": jax.random.key(0, impl="rbg")})
        found, _ = checkpointer.restore(abstract)
    expected = jax.random.normal(state["key"], (4,))
    np.testing.assert_array_equal(jax.random.normal(found["key"], (4,)), expected)


def test_buffers_may_be_donated_after_save(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = {"w": jnp.arange(1 << 16, dtype=jnp.float32)}
    with open_folder(tmp_path) as checkpointer:
        checkpointer.save(1, state, None)
        jax.block_until_ready(step(state))
        checkpointer.wait()
        found, _ = checkpointer.restore({"w": jax.ShapeDtypeStruct((1 << 16,), jnp.float32)})
    np.testing.assert_array_equal(found["w"], np.arange(1 << 16, dtype=np.float32))


def test_the_newest_stay_and_are_found_by_another_run(tmp_path):
    fill(tmp_path, 1, 2, 3, 10)
    with open_folder(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 10
        assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "3"]
        checkpointer.save(10, small_state(99), {"position": 99})  # is there already
        assert_same(checkpointer.restore(small_state(0)), (small_state(10), {"position": 10}))


SAVE_SHARDED = """
import sys, jax, jax.numpy as jnp
from arl2_jax.training.checkpoint import Checkpointer
P = jax.sharding.PartitionSpec
mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
place = lambda x, *spec: jax.device_put(x, jax.sharding.NamedSharding(mesh, P(*spec)))
state = {"w": place(jnp.arange(128.0).reshape(16, 8), "fsdp", "tensor"), "b": place(jnp.ones(8)),
         "key": place(jax.random.key(4))}
with Checkpointer(sys.argv[1], keep=1, fingerprint={}) as checkpointer:
    checkpointer.save(1, state, None)
"""


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices")
def test_another_number_of_devices_and_another_sharding(tmp_path):
    assert run(SAVE_SHARDED, tmp_path, devices=8).wait() == 0
    devices = jax.devices()[:2]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    columns = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    abstract = {
        "w": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=columns),
        "b": jax.ShapeDtypeStruct((8,), jnp.float32),
        "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=everywhere),
    }
    with open_folder(tmp_path, fingerprint={}) as checkpointer:
        found, _ = checkpointer.restore(abstract)
    assert found["w"].sharding == columns
    assert found["key"].sharding.device_set == set(devices)
    expected = {
        "w": jnp.arange(128.0).reshape(16, 8),
        "b": jnp.ones(8),
        "key": jax.random.key(4),
    }
    assert_same(found, expected)


SAVE_FOREVER = """
import itertools, sys, jax.numpy as jnp
from arl2_jax.training.checkpoint import Checkpointer
state = lambda step: {"w": jnp.full((64,), step, jnp.float32), "step": jnp.int32(step)}
with Checkpointer(sys.argv[1], keep=2, fingerprint={}) as checkpointer:
    start = 0
    if checkpointer.latest_step() is not None:
        start = checkpointer.restore(state(0))[1]["position"]
    for step in itertools.count(start + 1):
        checkpointer.save(step, state(step), {"position": step})
        checkpointer.wait()
        print(step, flush=True)
"""


def test_a_killed_run_loses_nothing_that_was_finished(tmp_path):
    finished = 0
    for kill in range(4):
        process = run(SAVE_FOREVER, tmp_path, stdout=subprocess.PIPE)
        assert process.stdout is not None
        finished = int(process.stdout.readline())
        time.sleep(random.Random(kill).uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        finished = int(([finished, *process.stdout.read().split("\n")[:-1]])[-1])
        process.wait()
        with open_folder(tmp_path, fingerprint={}) as checkpointer:
            found, position = checkpointer.restore(small_state(0))
        step = int(found["step"])
        assert step in (finished, finished + 1)
        assert_same((found, position), (small_state(step), {"position": step}))
        assert all(p.name.isdigit() for p in tmp_path.iterdir())


def test_an_unfinished_save_and_a_half_deleted_step_are_swept_up(tmp_path):
    fill(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "2" / "meta", tmp_path / "3.orbax-checkpoint-tmp" / "meta")
    shutil.copytree(tmp_path / "1" / "state", tmp_path / "deleted" / "1" / "state")
    with open_folder(tmp_path) as checkpointer:
        assert checkpointer.latest_step() == 2
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]
        checkpointer.save(3, small_state(3), {"position": 3})
        checkpointer.wait()
        assert checkpointer.latest_step() == 3


def files_of(step):
    return sorted(p for p in step.rglob("*") if p.is_file() and p.parent.name != step.name)


def cut_off(step):
    file = max(files_of(step), key=lambda p: p.stat().st_size)
    file.write_bytes(file.read_bytes()[:-5])


def half_deleted(step):
    for file in files_of(step)[::2]:
        file.unlink()


def emptied(step):
    shutil.rmtree(step)
    step.mkdir()


@pytest.mark.parametrize("damage", [cut_off, half_deleted, emptied])
def test_a_damaged_step_falls_back_to_the_one_before(tmp_path, caplog, damage):
    fill(tmp_path, 1, 2)
    damage(tmp_path / "2")
    with caplog.at_level(logging.WARNING), open_folder(tmp_path) as checkpointer:
        caplog.clear()
        found = checkpointer.restore(small_state(0))
        assert_same(found, (small_state(1), {"position": 1}))
        assert len(caplog.records) == 1 and "2.damaged" in caplog.text
        assert checkpointer.latest_step() == 1
        checkpointer.save(2, small_state(2), {"position": 2})
        checkpointer.wait()
        assert_same(checkpointer.restore(small_state(0))[0], small_state(2))


def test_when_no_step_can_be_read_it_says_so_and_touches_nothing(tmp_path):
    fill(tmp_path, 1, 2)
    for step in ("1", "2"):
        cut_off(tmp_path / step)
    with (
        open_folder(tmp_path) as checkpointer,
        pytest.raises(StorageError, match="none of the 2 checkpoints") as error,
    ):
        checkpointer.restore(small_state(0))
    assert_one_line(error, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    with (
        open_folder(tmp_path) as checkpointer,
        pytest.raises(StorageError, match="holds no checkpoint"),
    ):
        checkpointer.restore(small_state(0))


@pytest.mark.parametrize(
    "model, parts",
    [
        ({"dim": 256, "hybrid_layers": (0, 1)}, ["model.dim is 128 there and 256 here"]),
        ({"dim": 128, "hybrid_layers": (0,)}, ["model.hybrid_layers is [0, 1] there and [0] here"]),
        ({"dim": 64}, ["model.dim is 128 there and 64 here (and 1 more)"]),
    ],
)
def test_another_model_is_one_line(tmp_path, model, parts):
    fill(tmp_path, 5)
    with (
        open_folder(tmp_path, fingerprint={"model": model}) as checkpointer,
        pytest.raises(ConfigError) as error,
    ):
        checkpointer.restore(small_state(0))
    assert_one_line(error, tmp_path, "name another train.workdir", *parts)
    assert (tmp_path / "5").exists()


@pytest.mark.parametrize(
    "state, part",
    [
        ({"w": jnp.zeros(32), "step": jnp.int32(0)}, "w is float32[64] there and float32[32] here"),
        ({"w": jnp.zeros(64), "step": 0.5}, "step is int32[] there and float64[] here"),
        ({"w": jnp.zeros(64)}, "step is int32[] there and absent here"),
    ],
)
def test_another_training_state_is_one_line(tmp_path, state, part):
    fill(tmp_path, 5)
    with open_folder(tmp_path) as checkpointer, pytest.raises(ConfigError) as error:
        checkpointer.restore(state)
    assert_one_line(error, tmp_path, part)


@contextlib.contextmanager
def full_disk():
    """No file may grow past 100 kB, whoever writes it."""
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # tensorstore
def test_a_save_that_fails_surfaces_and_leaves_the_earlier_one(tmp_path, caplog):
    noise = np.random.RandomState(0).randn(100_000)
    big = {"w": jnp.asarray(noise, jnp.float32), "step": jnp.int32(2)}
    checkpointer = open_folder(tmp_path)
    with full_disk():
        checkpointer.save(1, small_state(1), {"position": 1})
        checkpointer.save(2, big, None)
        with pytest.raises(StorageError, match="File too large") as error:
            checkpointer.wait()
        assert_one_line(error, tmp_path / "2", "step 1 is intact", "free space")
        checkpointer.save(3, big, None)
        with pytest.raises(StorageError, match="File too large"):
            checkpointer.save(4, big, None)
    assert "Traceback" not in caplog.text
    assert_same(checkpointer.restore(small_state(0)), (small_state(1), {"position": 1}))
    checkpointer.save(2, small_state(2), None)  # there is space again
    checkpointer.close()
    with open_folder(tmp_path) as checkpointer:
        assert_same(checkpointer.restore(small_state(0))[0], small_state(2))
