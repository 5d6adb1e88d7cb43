"""A phase that was stopped and resumed equals an uninterrupted one, bit for bit."""

import dataclasses
import json
import threading

import chex
import jax
import numpy as np
import pytest
from etils import epath

from arl2_jax import sharding
from arl2_jax.config import ShortClipsConfig
from arl2_jax.data import open_data
from arl2_jax.models import layer_of, unstack_params
from arl2_jax.training import loop
from arl2_jax.training.checkpoint import Checkpointer
from arl2_jax.training.loop import run_phase

# Threads that have compiled a program.
COMPILED = []


def listen(name, seconds, **_):
    if "backend_compile" in name:
        COMPILED.append(threading.current_thread())


jax.monitoring.register_event_duration_secs_listener(listen)


class StoppedError(Exception):
    """The process ends here."""


@dataclasses.dataclass
class Trace:
    """What a phase did: states and seconds saved, steps logged, programs compiled by then."""

    saved: dict = dataclasses.field(default_factory=dict)
    seconds: dict = dataclasses.field(default_factory=dict)
    logged: list = dataclasses.field(default_factory=list)
    shapes: list = dataclasses.field(default_factory=list)
    compiled: list = dataclasses.field(default_factory=list)
    result: object = None


@pytest.fixture(scope="module")
def six_steps(config):
    """The last two of six steps are self-rollouts."""
    return dataclasses.replace(
        config, stage2=dataclasses.replace(config.stage2, self_rollout=1 / 3, batch_size=4)
    )


@pytest.fixture(scope="module")
def train(six_steps, make_params):
    data, mesh = open_data(six_steps), sharding.make_mesh(six_steps.train.mesh, jax.devices()[:1])

    def run(folder, *, stop_at=None, config=six_steps):
        trace = Trace()

        class Saving(Checkpointer):
            def save(self, step, state, position):
                plain = state._replace(key=jax.random.key_data(state.key))
                values = jax.tree.map(np.asarray, plain)
                trace.saved[step] = values, position["data"]
                trace.seconds[step] = position["seconds"]
                super().save(step, state, position)

        class Logging(loop.MultiWriter):
            def write(self, step, metrics):
                if step == stop_at:
                    raise StoppedError
                super().write(step, metrics)
                trace.logged.append(step)
                trace.compiled.append(COMPILED.count(threading.main_thread()))

        def put(batch, mesh):
            trace.shapes.append(batch["latents"].shape[:2])
            return sharding_put(batch, mesh)

        sharding_put = sharding.put_batch
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "Checkpointer", Saving)
            patch.setattr(loop, "MultiWriter", Logging)
            patch.setattr(loop.sharding, "put_batch", put)
            params = make_params(six_steps.model)
            if stop_at is None:
                trace.result = run_phase(config, "stage2", params, data, mesh, folder)
            else:
                with pytest.raises(StoppedError):
                    run_phase(config, "stage2", params, data, mesh, folder)
        return trace

    return run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [epath.Path(tmp_path_factory.mktemp(name)) for name in ("whole", "stopped")]


@pytest.fixture(scope="module")
def whole(train, folders):
    return train(folders[0])


@pytest.fixture(scope="module")
def first_session(train, folders, whole):
    first = train(folders[1], stop_at=4)  # after checkpoint 2, before checkpoint 4
    assert list(first.saved) == [2] and first.logged == [1, 2, 3]
    return first


@pytest.fixture(scope="module")
def resumed(train, folders, first_session):
    return train(folders[1])


def test_resumed_is_uninterrupted(whole, resumed):
    assert list(whole.saved) == [2, 4, 6] and list(resumed.saved) == [4, 6]
    assert resumed.logged == [3, 4, 5, 6]
    for step in (4, 6):
        (state, position), (wanted, wanted_position) = resumed.saved[step], whole.saved[step]
        assert position == wanted_position
        chex.assert_trees_all_equal(state, wanted)
    chex.assert_trees_all_equal(resumed.result.params, whole.result.params)


def test_log_of_a_resumed_phase_has_every_step_once(whole, resumed, folders):
    one, other = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in folders
    )
    assert [line["step"] for line in other] == [1, 2, 3, 4, 5, 6]
    assert other == one


def test_phase_returns_the_average(whole, make_params, six_steps):
    params, state = whole.result.params, whole.saved[6][0]
    start = make_params(six_steps.model)["blocks"]["0"]
    found, average, last = (
        layer_of(tree, 0)["delta"]["phi_k"] for tree in (params, state.ema, state.params)
    )
    np.testing.assert_array_equal(found, average)
    assert np.any(found != last) and np.any(found != start["delta"]["phi_k"])
    kernel = lambda layer: layer["self_attn"]["q"]["kernel"]
    np.testing.assert_array_equal(kernel(layer_of(params, 0)), kernel(start))


def test_nothing_is_compiled_between_steps(whole):
    """Steps 1 to 4 are of one kind, 5 and 6 of the other; both compile in the background."""
    steps = dict(zip(whole.logged, whole.compiled, strict=True))
    # The first checkpoint is saved between steps 2 and 3: saving may compile its first time.
    assert steps[1] == steps[2] and steps[3] == steps[6]
    assert any(thread is not threading.main_thread() for thread in COMPILED)


def test_finished_phase_takes_no_step(train, whole, folders):
    again = train(folders[0])
    assert again.logged == [] and again.saved == {}
    chex.assert_trees_all_equal(again.result.params, whole.result.params)
    assert again.result.seconds == whole.result.seconds  # read, not measured


def test_seconds_are_those_of_all_sessions(whole, resumed, first_session):
    """They rise from checkpoint to checkpoint, across processes too."""
    for trace in (whole, resumed):
        assert trace.result.seconds == trace.seconds[6] > trace.seconds[4]
    assert resumed.seconds[4] > first_session.seconds[2] > 0


@pytest.mark.slow
def test_short_clips_come_first_and_resume_anywhere(six_steps, train, tmp_path):
    """Stopped among the short clips, at their end, or later: the same phase, bit for bit."""
    config = dataclasses.replace(
        six_steps,
        data=dataclasses.replace(six_steps.data, short=ShortClipsConfig(frames=2)),
        stage2=dataclasses.replace(six_steps.stage2, steps=8, short_steps=4, self_rollout=0.0),
    )
    whole = train(epath.Path(tmp_path / "whole"), config=config)
    assert whole.shapes == [(8, 2)] * 4 + [(4, 4)] * 4
    folder = epath.Path(tmp_path / "stopped")
    for stop, saved in ((3, [2]), (5, [4]), (7, [6])):
        assert list(train(folder, stop_at=stop, config=config).saved) == saved
    last = train(folder, config=config)
    assert last.logged == [7, 8] and last.shapes == [(4, 4)] * 2
    chex.assert_trees_all_equal(last.saved[8][0], whole.saved[8][0])
    assert last.saved[8][1] == whole.saved[8][1]
    chex.assert_trees_all_equal(last.result.params, whole.result.params)


def test_phase_of_no_steps_changes_nothing(six_steps, make_params, tmp_path):
    none = dataclasses.replace(six_steps, stage1=dataclasses.replace(six_steps.stage1, steps=0))
    params = make_params(six_steps.model)
    mesh = sharding.make_mesh(six_steps.train.mesh, jax.devices()[:1])
    result = run_phase(none, "stage1", params, open_data(none), mesh, epath.Path(tmp_path))
    chex.assert_trees_all_equal(unstack_params(result.params), params)


@pytest.mark.parametrize(
    ("good", "message"),
    [(1, "step 2, no step is kept"), (3, "step 4, step 2 is the last good one")],
)
def test_what_diverges_is_not_kept(six_steps, make_params, tmp_path, monkeypatch, good, message):
    """The steps after `good` see clips that are not finite; every second step is checkpointed."""
    put, seen = sharding.put_batch, []

    def spoil(batch, mesh):
        seen.append(None)
        factor = np.float32(np.nan if len(seen) > good else 1)
        return put(batch | {"latents": batch["latents"] * factor}, mesh)

    monkeypatch.setattr(loop.sharding, "put_batch", spoil)
    mesh = sharding.make_mesh(six_steps.train.mesh, jax.devices()[:1])
    arguments = ("stage1", make_params(six_steps.model), open_data(six_steps), mesh)
    with pytest.raises(FloatingPointError) as error:
        run_phase(six_steps, *arguments, epath.Path(tmp_path))
    line = str(error.value)
    assert line.startswith("stage1.learning_rate=0.001: the loss is nan at ") and message in line
    assert "lower it" in line and "\n" not in line
    kept = [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()]
    assert kept == (["2"] if good == 3 else [])
