"""One phase of training: steps, logs, checkpoints; resumable at any moment."""

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from absl import logging
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arl2_jax import sharding
from arl2_jax.config import Config, ModelConfig
from arl2_jax.data import ClipData, open_short_data
from arl2_jax.errors import WeightsError
from arl2_jax.models import Params, cast_backbone, is_added, stack_params
from arl2_jax.training.checkpoint import FROZEN, Checkpointer
from arl2_jax.training.metrics import JsonLinesWriter, MultiWriter, ProgressBar, TensorBoardWriter
from arl2_jax.training.partition import TRAINED, merge_params, split_params
from arl2_jax.training.step import TrainState, init_state, make_step
from arl2_jax.weights import checksum

# Short clips have a separate shuffle.
_SHORT_SEED = 2**31


@dataclasses.dataclass(frozen=True)
class PhaseResult:
    """Result of a phase.

    Attributes:
      params: all parameters after the phase, stacked; trained ones are float32, and averaged if the
        phase averages, the others in their compute dtype.
      teacher: checksum of the teacher's weights among those that the phase did not train.
      seconds: wall time of its steps over all its sessions, without compilation.
      compile_seconds: wall time that the last session's steps waited for compilation.
    """

    params: Params
    teacher: str
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
    """Train one phase from its newest checkpoint, or from the start.

    Args:
      config: the run.
      phase: "teacher", "stage1" or "stage2".
      params: all parameters at the start of the phase, in either form. Those that the phase does
        not train are cast to the compute dtype; ones already cast and sharded are not copied.
      data: clips to train on.
      mesh: devices.
      folder: where checkpoints and logs of this phase are kept.
      title: name in the progress bar, by default the phase.

    Raises:
      UserError: a checkpoint cannot be written, or is that of another run.
      FloatingPointError: the loss is not finite.
    """
    title = title or phase
    key = jax.random.fold_in(jax.random.key(config.train.seed), list(TRAINED).index(phase))
    params = stack_params(params, phase_model(config, phase))
    if phase != "teacher":
        params = cast_backbone(params, config.model)
    trained, frozen = split_params(params, TRAINED[phase])
    del params
    state = jax.eval_shape(lambda p: init_state(config, phase, p, key), trained)
    shardings = sharding.tree_shardings(state, mesh)
    frozen = sharding.put(frozen, sharding.tree_shardings(frozen, mesh))
    teacher = teacher_checksum(frozen)
    fingerprint = {
        "phase": phase,
        "model": dataclasses.asdict(config.model),
        FROZEN: teacher,
    }
    with Checkpointer(
        folder / "checkpoints", keep=config.train.keep, fingerprint=fingerprint
    ) as checkpointer:
        position = {"data": None, "seconds": 0.0}
        if checkpointer.latest_step() is None:
            start = jax.jit(lambda p: init_state(config, phase, p, key), out_shardings=shardings)
            state = start(trained)
        else:
            state, position = checkpointer.restore(_abstract(state, shardings))
            logging.info("%s resumes after step %d", title, int(state.step))
        del trained
        session = _Session(config, phase, title, state, frozen, mesh, shardings)
        writers = _open_writers(folder, title, session.settings.steps, session.step)
        try:
            session.run(_parts(config, phase, data), writers, checkpointer, position)
        finally:
            writers.close()
    averaged = session.state.ema if session.settings.ema_decay else session.state.params
    params = merge_params(frozen, averaged)
    return PhaseResult(params, teacher, session.seconds, session.compile_seconds)


def _abstract(state: TrainState, shardings: TrainState) -> TrainState:
    """Return the shapes, dtypes and shardings of a state."""
    struct = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(struct, state, shardings)


class _Part(NamedTuple):
    """Steps of a phase on clips of one length.

    Attributes:
      config: the run, with the shapes of these clips.
      data: the clips.
      seed: seed of their order.
      start, end: its first step, and the one after its last.
    """

    config: Config
    data: ClipData
    seed: int
    start: int
    end: int


def _parts(config: Config, phase: str, data: ClipData) -> list[_Part]:
    settings, seed = getattr(config, phase), data_seed(config, phase)
    short = settings.short_steps
    parts = [_Part(config, data, seed, short, settings.steps)]
    if short:
        own = open_short_data(config, phase)
        parts.insert(0, _Part(own.config, own, seed + _SHORT_SEED, 0, short))
    return parts


class _Session:
    """The steps of one process lifetime."""

    def __init__(self, config, phase, title, state: TrainState, frozen, mesh, shardings):
        self.config, self.phase, self.title = config, phase, title
        self.mesh, self.shardings = mesh, shardings
        self.settings = getattr(config, phase)
        self.state, self.frozen = state, frozen
        self.abstract_state = _abstract(state, shardings)
        self.step = self.saved = int(state.step)
        self.seconds = self.compile_seconds = 0.0
        share = config.stage2.self_rollout if phase == "stage2" else 0.0
        self.first_rollout_step = round(self.settings.steps * (1 - share))

    def run(
        self,
        parts: Sequence[_Part],
        writers: MultiWriter,
        checkpointer: Checkpointer,
        position: Mapping[str, Any],
    ) -> None:
        """Step to the end of the phase; the last step is logged and checkpointed.

        Args:
          parts: parts of the phase, in order.
          writers, checkpointer: where logs and checkpoints go.
          position: "seconds" of earlier sessions, and "data", the data iterator's state after
            their last step.
        """
        self.seconds = position["seconds"]
        # Later programs compile while earlier ones run.
        with ThreadPoolExecutor(1) as pool:
            programs = {
                (part.start, self_rollout): pool.submit(self._compile, part, self_rollout)
                for part, self_rollout in self._kinds(parts)
            }
            try:
                for part in parts:
                    if self.step < part.end:
                        self._run_part(part, programs, writers, checkpointer, position["data"])
            finally:
                pool.shutdown(cancel_futures=True)

    def _kinds(self, parts: Sequence[_Part]) -> list[tuple[_Part, bool]]:
        """Return the programs still needed, as (part, whether its steps are self-rollouts)."""
        found = []
        for part in parts:
            first = max(self.step, part.start)
            if first < min(part.end, self.first_rollout_step):
                found.append((part, False))
            if max(first, self.first_rollout_step) < part.end:
                found.append((part, True))
        return found

    def _run_part(self, part: _Part, programs, writers, checkpointer, position) -> None:
        size = getattr(part.config, self.phase).batch_size
        batches = part.data.train_batches(size, part.seed)
        if self.step > part.start and position is not None:
            batches.set_state(position)
        try:
            self._steps(part, programs, batches, writers, checkpointer)
        finally:
            batches.close()

    def _steps(self, part: _Part, programs, batches, writers, checkpointer) -> None:
        earlier, began = self.seconds, time.perf_counter()
        while self.step < part.end:
            batch = sharding.put_batch(next(batches), self.mesh)
            program = programs[part.start, self.step >= self.first_rollout_step]
            if not program.done():
                paused = time.perf_counter()
                program.result()
                waited = time.perf_counter() - paused
                self.compile_seconds, began = self.compile_seconds + waited, began + waited
            self.state, metrics = program.result()(self.state, self.frozen, batch)
            self.step += 1
            last = self.step == self.settings.steps
            if last or self.step % self.config.train.log_every == 0:
                writers.write(self.step, metrics)
            saves = last or self.step % self.config.train.checkpoint_every == 0
            if saves or self.step == part.end:
                self._check_finite(metrics)
                self.seconds = earlier + time.perf_counter() - began
            if saves:
                position = {"data": batches.get_state(), "seconds": self.seconds}
                checkpointer.save(self.step, self.state, position)
                self.saved = self.step

    def _check_finite(self, metrics) -> None:
        """Raise FloatingPointError if the loss diverged; the last checkpoint stays."""
        loss = float(metrics["loss"])
        if not math.isfinite(loss):
            kept = f"step {self.saved} is the last good one" if self.saved else "no step is kept"
            raise FloatingPointError(
                f"{self.phase}.learning_rate={self.settings.learning_rate}: the loss is {loss} at "
                f"step {self.step}, {kept}; lower it and start again in another train.workdir"
            )

    def _compile(self, part: _Part, self_rollout: bool):
        """Compile the step ahead of time: another shape later on is an error."""
        began, replicated = time.perf_counter(), NamedSharding(self.mesh, PartitionSpec())
        step = jax.jit(
            make_step(part.config, self.phase, self_rollout=self_rollout),
            donate_argnums=0,
            out_shardings=(self.shardings, replicated),
        )
        model, data = part.config.model, part.config.data
        size = getattr(part.config, self.phase).batch_size
        shapes = {
            "latents": (size, data.frames, *part.config.latent_shape),
            "text": (size, model.text_len, model.text_dim),
        }
        batch = sharding.abstract_batch(shapes, self.mesh)
        # Kernels are sharded over this mesh.
        with jax.set_mesh(self.mesh):
            program = step.lower(self.abstract_state, self.frozen, batch).compile()
        logging.info("%s: compiled in %.1f s", self.title, time.perf_counter() - began)
        return program


def _open_writers(folder: epath.Path, title: str, steps: int, start: int) -> MultiWriter:
    resume = start or None
    if jax.process_index():
        return MultiWriter()
    return MultiWriter(
        ProgressBar(title, steps, start=start),
        JsonLinesWriter(folder / "metrics.jsonl", resume_step=resume),
        TensorBoardWriter(folder / "tensorboard", resume_step=resume),
    )


def phase_model(config: Config, phase: str) -> ModelConfig:
    """Return the model that a phase trains."""
    return config.model.teacher() if phase == "teacher" else config.model


def teacher_checksum(params: Params) -> str:
    """Return a checksum of the teacher's weights among some parameters.

    Additions do not count: those that a phase does not train keep their initial values, which the
    seed determines, but not bit for bit on every kind of device.
    """
    return checksum(split_params(params, is_added)[1])


def check_same_teacher(
    config: Config, phase_folder: epath.Path, there: str | None, start: Params
) -> None:
    """Reject results of a phase whose frozen weights differ from those it would start with now.

    Args:
      config: the run.
      phase_folder: folder of the phase, or of its fit.
      there: checksum of the frozen weights that is kept with the results; None in older ones.
      start: parameters that the phase would start with.

    Raises:
      WeightsError: one line with both checksums.
    """
    here = teacher_checksum(start)
    if there is None:
        logging.warning(
            "%s does not name its frozen weights; those of this run are taken to be the same",
            phase_folder,
        )
    elif there != here:
        raise WeightsError(
            f"{phase_folder} was trained with other frozen weights than "
            f"teacher.weights={config.teacher.weights} gives now: checksum {there} there "
            f"and {here} here",
            remedy="put the teacher's weights back, or start in another folder",
        )


def data_seed(config: Config, phase: str) -> int:
    """Return the seed of a phase's clip order; a control shares that of its phase."""
    return config.train.seed * len(TRAINED) + list(TRAINED).index(phase)


def read_json(path: epath.Path) -> Any:
    """Return the content of a JSON file, or None if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None
