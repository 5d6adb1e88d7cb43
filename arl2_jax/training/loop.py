"""One phase of training: steps, logs, checkpoints; resumable at any moment."""

import dataclasses
import json
import math
import time
from typing import Any

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arl2_jax import sharding
from arl2_jax.config import Config, ConfigError
from arl2_jax.data import ClipData
from arl2_jax.models import Params
from arl2_jax.training.checkpoint import Checkpointer
from arl2_jax.training.metrics import JsonLinesWriter, MultiWriter, ProgressBar, TensorBoardWriter
from arl2_jax.training.partition import TRAINED, merge_params, split_params
from arl2_jax.training.step import TrainState, init_state, make_step


@dataclasses.dataclass(frozen=True)
class PhaseResult:
    """What a phase hands on.

    Attributes:
      params: all parameters after the phase, trained ones averaged if the phase averages.
      seconds: wall time of its steps over all its sessions, compilation apart.
      compile_seconds: wall time of compilation in the last session.
    """

    params: Params
    seconds: float
    compile_seconds: float


def run_phase(
    config: Config,
    phase: str,
    params: Params,
    data: ClipData,
    mesh: Mesh,
    folder: epath.Path,
    *,
    title: str | None = None,
) -> PhaseResult:
    """Trains one phase from its newest checkpoint, or from the start.

    Args:
      config: the run.
      phase: "teacher", "stage1" or "stage2".
      params: all parameters at the start of the phase; those the phase leaves are not copied.
      data: clips to train on.
      mesh: devices.
      folder: where checkpoints and logs of this phase are kept.
      title: name in the progress bar, by default the phase.
    """
    settings, title = getattr(config, phase), title or phase
    key = jax.random.fold_in(jax.random.key(config.train.seed), list(TRAINED).index(phase))
    trained, frozen = split_params(params, TRAINED[phase])
    state = jax.eval_shape(lambda p: init_state(config, phase, p, key), trained)
    layout = sharding.tree_shardings(state, mesh)
    batches = data.train_batches(settings.batch_size, data_seed(config, phase))

    fingerprint = {"phase": phase, "model": dataclasses.asdict(config.model)}
    with Checkpointer(
        folder / "checkpoints", keep=config.train.keep, fingerprint=fingerprint
    ) as checkpointer:
        seconds = 0.0
        if checkpointer.latest_step() is None:
            start = jax.jit(lambda p: init_state(config, phase, p, key), out_shardings=layout)
            state = start(trained)
        else:
            abstract = jax.tree.map(
                lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
                state,
                layout,
            )
            state, position = checkpointer.restore(abstract)
            batches.set_state(position["data"])
            seconds = position["seconds"]
            logging.info("%s resumes after step %d", title, int(state.step))
        del trained
        frozen = sharding.put(frozen, sharding.tree_shardings(frozen, mesh))
        session = _Session(config, phase, title, state, frozen, batches, mesh, layout)
        writers = _open_writers(folder, title, settings.steps, session.step)
        try:
            session.run(writers, checkpointer, seconds)
        finally:
            writers.close()
            batches.close()
    averaged = session.state.ema if settings.ema_decay else session.state.params
    return PhaseResult(merge_params(averaged, frozen), session.seconds, session.compile_seconds)


class _Session:
    """The steps of one process lifetime."""

    def __init__(self, config, phase, title, state: TrainState, frozen, batches, mesh, layout):
        self.config, self.phase, self.title = config, phase, title
        self.mesh, self.layout = mesh, layout
        self.settings = getattr(config, phase)
        self.state, self.frozen, self.batches = state, frozen, batches
        self.step = int(state.step)
        self.seconds = self.compile_seconds = 0.0
        share = config.stage2.self_rollout if phase == "stage2" else 0.0
        self.first_rollout_step = round(self.settings.steps * (1 - share))

    def run(self, writers: MultiWriter, checkpointer: Checkpointer, earlier: float) -> None:
        """Steps to the end of the phase; the last step is logged and checkpointed."""
        self.seconds = earlier
        compiled: dict[bool, Any] = {}
        began = time.perf_counter()
        while self.step < self.settings.steps:
            batch = sharding.put_batch(next(self.batches), self.mesh)
            own_past = self.step >= self.first_rollout_step
            if own_past not in compiled:
                paused = time.perf_counter()
                compiled[own_past] = self._compile(own_past, batch)
                spent = time.perf_counter() - paused
                self.compile_seconds, began = self.compile_seconds + spent, began + spent
                logging.info("%s: compiled in %.1f s", self.title, spent)
            self.state, metrics = compiled[own_past](self.state, self.frozen, batch)
            self.step += 1
            last = self.step == self.settings.steps
            if last or self.step % self.config.train.log_every == 0:
                writers.write(self.step, metrics)
            if last or self.step % self.config.train.checkpoint_every == 0:
                self._check_finite(metrics)
                self.seconds = earlier + time.perf_counter() - began
                position = {"data": self.batches.get_state(), "seconds": self.seconds}
                checkpointer.save(self.step, self.state, position)

    def _check_finite(self, metrics) -> None:
        """Nothing that has diverged is checkpointed; the checkpoint before it stays."""
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            raise ConfigError(
                f"{self.phase}.learning_rate={self.settings.learning_rate}: the loss is {loss} at "
                f"step {self.step}; lower it and start again in another train.workdir"
            )

    def _compile(self, own_past: bool, batch):
        """The step, compiled ahead of time: another shape later on would be an error."""
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        step = jax.jit(
            make_step(self.config, self.phase, self_rollout=own_past),
            donate_argnums=0,
            out_shardings=(self.layout, everywhere),
        )
        # Where kernels look for the devices that they are to share out their work to.
        with jax.set_mesh(self.mesh):
            return step.lower(self.state, self.frozen, batch).compile()


def _open_writers(folder: epath.Path, title: str, steps: int, start: int) -> MultiWriter:
    resume = start or None
    if jax.process_index():
        return MultiWriter()
    return MultiWriter(
        ProgressBar(title, steps, start=start),
        JsonLinesWriter(folder / "metrics.jsonl", resume_step=resume),
        TensorBoardWriter(folder / "tensorboard", resume_step=resume),
    )


def data_seed(config: Config, phase: str) -> int:
    """Every phase sees clips in an order of its own; the control sees those of its phase."""
    return config.train.seed * len(TRAINED) + list(TRAINED).index(phase)


def read_json(path: epath.Path) -> Any:
    """A JSON file's content, or None if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None
