"""A run resumes with the teacher that it started with, or raises an error."""

import dataclasses
import hashlib
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_line import assert_one_line

from arl2_jax import sharding
from arl2_jax.config import Config, MeshConfig, to_config_dict
from arl2_jax.errors import WeightsError
from arl2_jax.models import Params, without_delta
from arl2_jax.training import loop, pipeline
from arl2_jax.training.checkpoint import FROZEN, Checkpointer
from arl2_jax.training.loop import teacher_checksum
from arl2_jax.training.pipeline import convert, prepare
from arl2_jax.weights import checksum, checksums
from arl2_jax.weights.folder import save_params

PATH = ("blocks", "1", "ffn", "fc2", "kernel")


class StoppedError(Exception):
    """The process ends here."""


def edited(params: Params, change, path=PATH) -> Params:
    """A copy with one leaf replaced."""
    name, *rest = path
    node = edited(params[name], change, rest) if rest else change(np.array(params[name]))
    return {**params, name: node}


def flip_one_bit(x):
    x.view(np.uint32)[-1, -1] ^= 1
    return x


def swap_rows(x):
    return x[::-1].copy()


def change_one_sign_of_zero(x):
    x[0, 0] = -x[0, 0]
    return x


def test_any_change_of_the_weights_changes_their_checksum(params):
    zeros = edited(params, lambda x: x * 0)
    found = [
        checksum(params),
        checksum(zeros),
        checksum(edited(zeros, change_one_sign_of_zero)),
        checksum(edited(params, flip_one_bit)),
        checksum(edited(params, swap_rows)),
        checksum(edited(params, lambda x: x.T.copy())),
        checksum(edited(params, lambda x: x.reshape(-1))),
        checksum(edited(params, lambda x: x.astype(jnp.bfloat16))),
        checksum(edited(params, lambda x: x.astype(np.float16))),
        checksum(params | {"further": np.zeros(())}),
        checksum(without_delta(params)),
        checksum({}),
    ]
    assert len(set(found)) == len(found)


def test_arrays_that_swap_their_names_are_other_weights():
    a, b = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    assert checksum({"q": a, "k": b}) != checksum({"q": b, "k": a})


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1), MeshConfig(1, 8, 1), MeshConfig(2, 2, 2)])
def test_checksum_does_not_depend_on_devices(params, mesh):
    places = sharding.tree_shardings(params, sharding.make_mesh(mesh))
    on_mesh = sharding.put(params, places)
    host = jax.device_get(params)
    assert checksum(on_mesh) == checksum(params) == checksum(host)


def test_no_device_gathers_the_weights():
    """At billions of parameters, a gathered array may not fit."""
    mesh = sharding.make_mesh(MeshConfig(1, 4, 2))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    x = jax.device_put(np.ones((64, 32), np.float32), place)
    program = checksums._sums.lower(x).compile().as_text()
    assert "all-reduce" in program
    assert not any(name in program for name in ("all-gather", "all-to-all", "f32[64,32]"))


def mixed(x):
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def summed(bits):
    """The two sums of an array, in Python's integers."""
    seeds = (0, 0x5BD1E995)
    return [sum(mixed(b ^ mixed(i ^ s)) for i, b in enumerate(bits)) % 2**32 for s in seeds]


def test_checksum_is_what_it_is_defined_to_be():
    """It is stored: if it changes, no older checkpoint can be resumed."""
    whole = np.arange(6, dtype=np.float32).reshape(2, 3) - 2.5
    half = jnp.arange(4, dtype=jnp.bfloat16)
    first, second = whole.view(np.uint32).ravel(), np.asarray(half).view(np.uint16)
    text = f"a (4,) bfloat16 {summed(second.tolist())}\n"
    text += f"b/a (2, 3) float32 {summed(first.tolist())}\n"
    wanted = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert checksum({"b": {"a": whole}, "a": half}) == wanted


def test_additions_are_no_part_of_the_teacher(params):
    moved = edited(params, lambda x: x + 1, ("blocks", "0", "delta", "phi_q"))
    assert teacher_checksum(moved) == teacher_checksum(params) != checksum(params)
    assert teacher_checksum(edited(params, flip_one_bit)) != teacher_checksum(params)


@pytest.fixture
def run(config, make_params, tmp_path):
    """A conversion of weights in a folder."""
    teacher = make_params(config.model.teacher())
    save_params(tmp_path / "teacher", teacher, to_config_dict(config.model.teacher()))
    return dataclasses.replace(
        config,
        teacher=dataclasses.replace(config.teacher, weights=str(tmp_path / "teacher")),
        train=dataclasses.replace(config.train, workdir=str(tmp_path / "run")),
    )


@pytest.fixture
def finish(monkeypatch):
    """Phases that save a checkpoint and take no step; the last one named stops after that."""
    monkeypatch.setattr(pipeline, "record_retention", lambda *_, **__: None)

    def go(config: Config, stopped: str | None = None):
        def run_steps(session, parts, writers, checkpointer, position):
            if checkpointer.latest_step() is None:
                checkpointer.save(2, session.state, {"data": None, "seconds": 0.0})
                checkpointer.wait()
            if session.title == stopped:
                raise StoppedError

        monkeypatch.setattr(loop._Session, "run", run_steps)
        return convert(config, *prepare(config))

    return go


def replace_teacher(run, make_params, change=flip_one_bit):
    cfg = run.model.teacher()
    weights = edited(make_params(cfg), change)
    save_params(run.teacher.weights, weights, to_config_dict(cfg))


@pytest.mark.parametrize(("phases", "stopped"), [
    (("stage1", "stage2"), "stage1"),
    (("stage1", "stage2"), "stage2"),
    (("stage2",), "stage2"),
    (("stage2",), "control"),
])  # fmt: skip
def test_another_teacher_in_the_same_file_is_refused(run, finish, make_params, phases, stopped):
    run = dataclasses.replace(run, phases=phases)
    with pytest.raises(StoppedError):
        finish(run, stopped)
    replace_teacher(run, make_params)
    with pytest.raises(WeightsError) as caught:
        finish(run, stopped)
    # A finished phase comes before the one that was stopped.
    place = f"{run.train.workdir}/{phases[0]}"
    assert_one_line(caught, place, "other frozen weights", "put the teacher's weights back")
    replace_teacher(run, make_params, lambda x: x)  # the remedy
    with pytest.raises(StoppedError):
        finish(run, stopped)


def test_finished_run_with_another_teacher_is_refused(run, finish, make_params):
    run = dataclasses.replace(run, phases=("stage2",))
    finish(run)
    finish(run)
    replace_teacher(run, make_params)
    with pytest.raises(WeightsError) as caught:
        finish(run)
    assert_one_line(caught, f"{run.train.workdir}/stage2", run.teacher.weights)


def test_checkpoint_that_names_no_frozen_weights_is_read_with_a_warning(tmp_path, caplog):
    state = {"w": jnp.ones(4)}
    with Checkpointer(tmp_path, keep=2, fingerprint={"phase": "stage2"}) as checkpointer:
        checkpointer.save(1, state, None)
    named = {"phase": "stage2", FROZEN: "00ff"}
    with caplog.at_level(logging.WARNING):
        with Checkpointer(tmp_path, keep=2, fingerprint=named) as checkpointer:
            checkpointer.restore(state)
            checkpointer.save(2, state, None)
        (record,) = [r for r in caplog.records if "frozen" in r.getMessage()]
        assert f"{tmp_path}/1" in record.getMessage() and "\n" not in record.getMessage()
        caplog.clear()
        with Checkpointer(tmp_path, keep=2, fingerprint=named) as checkpointer:
            checkpointer.restore(state)
        assert not caplog.records
    other = named | {FROZEN: "11ee"}
    with (
        Checkpointer(tmp_path, keep=2, fingerprint=other) as checkpointer,
        pytest.raises(WeightsError) as caught,
    ):
        checkpointer.restore(state)
    assert_one_line(caught, tmp_path / "2", "stage2", "00ff there and 11ee here", "another folder")
