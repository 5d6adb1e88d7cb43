"""The whole run: its phases in order, then the controls."""

import dataclasses
import json
import math
from typing import Any

import jax
from absl import logging
from etils import epath

from arl2_jax import models, sharding
from arl2_jax.config import Config, ModelConfig, to_config_dict, with_steps
from arl2_jax.data import ClipData, open_data, open_short_data
from arl2_jax.errors import ConfigError
from arl2_jax.json_trees import as_json
from arl2_jax.models import Params
from arl2_jax.storage import check_writable, write_whole
from arl2_jax.training.checkpoint import FROZEN
from arl2_jax.training.loop import check_same_teacher, phase_model, read_json, run_phase
from arl2_jax.training.partition import TRAINED, merge_params, split_params
from arl2_jax.training.retention import record_retention
from arl2_jax.training.start import start_stage1
from arl2_jax.training.step import init_state
from arl2_jax.weights import find_release, load_params
from arl2_jax.weights.folder import load_params_folder, save_params, saved_shapes

_CONFIG, _SUMMARY = "config.json", "summary.json"
# Fields (or groups of them) that may differ between two starts of one run. A field belongs here if
# it changes neither what is trained nor on which clips, in which order. data.held_out does: the
# clips that are not held out are trained on.
RESUMABLE_FIELDS = ("train.log_every", "train.checkpoint_every", "train.keep", "train.mesh",
                    "train.workdir", "evaluation")  # fmt: skip
# May differ unless a phase resumes in the middle of its clips: their order is the same, but the
# position in a checkpoint depends on the number of workers.
_BETWEEN_PHASES = ("data.workers",)


@dataclasses.dataclass(frozen=True)
class Converted:
    """The models of a finished run, each a complete parameter tree, stacked.

    They share the arrays of the teacher's weights: each further model takes only the memory of
    what conversion adds.

    Attributes:
      untrained: the hybrid before conversion; its softmax weights are the teacher's.
      stage1, stage2: the hybrid after each stage; None if the run leaves the stage out.
      control: the hybrid with its memory gate at zero, trained like the student; or None.
      control_local: the same, with the trained projections on the softmax inside the block; or
        None.
      seconds, compile_seconds: wall time per phase, without compilation and of compilation.
    """

    untrained: Params
    stage1: Params | None
    stage2: Params | None
    control: Params | None
    control_local: Params | None
    seconds: dict[str, float]
    compile_seconds: dict[str, float]


def prepare(config: Config) -> tuple[epath.Path, ClipData, Params]:
    """Check everything that can be checked before compiling: folder, data, weights, mesh.

    Returns:
      The run's folder, its clips, and the parameters it starts from, stacked and sharded over the
      mesh. The teacher's are float32 if the run trains them, and cast to the compute dtype if not.

    Raises:
      UserError: what is wrong, in one line with the remedy.
    """
    models.check_trainable(config.model)
    mesh = sharding.make_mesh(config.train.mesh)
    sharding.check_blocks(mesh, config.blocks)
    for phase in config.phases:
        settings = getattr(config, phase)
        sharding.check_batch(mesh, settings.batch_size, settings.accumulation, phase)
        if settings.short_steps:
            short = open_short_data(config, phase).config
            sharding.check_blocks(mesh, short.blocks, frames="data.short.frames")
    folder = epath.Path(config.train.workdir)
    table = sharding.sharding_table(models.param_shapes(config.model), mesh)
    _check_same_run(folder, config)
    data = open_data(config)
    check_writable(folder, bytes_to_write(config, folder), "train.workdir")
    params = _initial_params(config, mesh)
    _write_json(folder / _CONFIG, to_config_dict(config))
    if mesh.size > 1:
        logging.info("parameters on %d devices:\n%s", mesh.size, table)
    return folder, data, params


def convert(config: Config, folder: epath.Path, data: ClipData, params: Params) -> Converted:
    """Run the phases that are not yet finished in `folder`.

    Args:
      config: the run.
      folder, data, params: as `prepare` returns them.
    """
    mesh = sharding.make_mesh(config.train.mesh)
    seconds, compile_seconds = {}, {}

    def phase(name: str, start: Params, *, config=config, title=None) -> Params:
        title = title or name
        phase_folder = folder / title
        summary = read_json(phase_folder / _SUMMARY)
        if summary is None:
            if name == "stage1":
                start = start_stage1(config, start, data, mesh, phase_folder)
            result = run_phase(config, name, start, data, mesh, phase_folder, title=title)
            weights = models.unstack_params(result.params)
            save_params(
                phase_folder / "weights", weights, to_config_dict(phase_model(config, name))
            )
            summary = {
                "seconds": result.seconds,
                "compile_seconds": result.compile_seconds,
                FROZEN: result.teacher,
            }
            _write_json(phase_folder / _SUMMARY, summary)
            trained = result.params
        else:
            logging.info(
                "%s is finished in %s; its weights are read from there", title, phase_folder
            )
            if name != "teacher":
                check_same_teacher(config, phase_folder, summary.get(FROZEN), start)
            trained = merge_params(
                start, _read_trained(config, name, phase_folder / "weights", mesh)
            )
        seconds[title] = summary["seconds"]
        compile_seconds[title] = summary["compile_seconds"]
        return trained

    if "teacher" in config.phases:
        params = _with_teacher(
            config, params, phase("teacher", _teacher_start(config, params, mesh)), mesh
        )
    untrained, stages = params, {}
    record_retention(config, untrained, data, folder, warn=True)
    for name in ("stage1", "stage2"):
        if name in config.phases:
            params = stages[name] = phase(name, params)
            record_retention(config, params, data, folder / name)
    controls = {
        title: phase("stage2", untrained, config=closed, title=title)
        for title, closed in _controls(config).items()
    }
    return Converted(
        untrained,
        stages.get("stage1"),
        stages.get("stage2"),
        controls.get("control"),
        controls.get("control_local"),
        seconds,
        compile_seconds,
    )


def control_config(config: Config, memory_gate: str) -> Config:
    """Return the run of a control without memory: stage 2 from the untrained hybrid.

    With a closed gate all gradients of stage 1 are zero, so it is left out. The local control is
    trained in the same way. Both take stage2.control_share of the steps.
    """
    steps = math.ceil(config.stage2.control_share * config.stage2.steps)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, memory_gate=memory_gate),
        stage1=dataclasses.replace(config.stage1, start="random"),
        stage2=dataclasses.replace(with_steps(config.stage2, steps), layer_loss=0.0),
    )


def control_name(memory_gate: str) -> str:
    """Return a control's name, in `Converted` and of its folder, by its model.memory_gate."""
    return "control" if memory_gate == "zero" else f"control_{memory_gate}"


def _controls(config: Config) -> dict[str, Config]:
    """Return the controls of a run, by name."""
    gates = config.evaluation.controls if "stage2" in config.phases else ()
    return {control_name(gate): control_config(config, gate) for gate in gates}


def bytes_to_write(config: Config, folder: epath.Path) -> int:
    """Return the bytes on disk that the phases not yet finished in `folder` still need.

    Each leaves `train.keep` checkpoints and its weights; during training one more checkpoint is
    written before the oldest is deleted.
    """
    phases = [(name, name, config) for name in config.phases]
    phases += [(title, "stage2", closed) for title, closed in _controls(config).items()]
    total, further = 0, 0
    for title, name, run in phases:
        if (folder / title / _SUMMARY).exists():
            continue
        checkpoint, weights = _phase_bytes(run, name)
        count = math.ceil(getattr(run, name).steps / run.train.checkpoint_every)
        kept, there = min(count, run.train.keep), len(_checkpoints(folder, title))
        total += max(kept - there, 0) * checkpoint + weights
        if count > run.train.keep:
            further = max(further, checkpoint)
    return total + further


def _phase_bytes(config: Config, phase: str) -> tuple[int, int]:
    """Return the bytes of one checkpoint of a phase, and of the weights that it leaves."""
    shapes = models.param_shapes(phase_model(config, phase))
    start = lambda p: init_state(config, phase, p, jax.random.key(0))
    state = jax.eval_shape(start, split_params(shapes, TRAINED[phase])[0])
    if phase != "teacher":
        shapes = jax.eval_shape(lambda p: models.cast_backbone(p, config.model), shapes)
    size = lambda tree: sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(tree))
    return size(state), size(shapes)


def _checkpoints(folder: epath.Path, phases: str) -> list[epath.Path]:
    """Return the finished checkpoints of the phases whose folder matches the pattern."""
    return [p for p in folder.glob(f"{phases}/checkpoints/*") if p.name.isdigit()]


def _initial_params(config: Config, mesh: jax.sharding.Mesh) -> Params:
    key, weights, model = jax.random.key(config.train.seed), config.teacher.weights, config.model
    trains_teacher = "teacher" in config.phases
    if weights == "random":
        return sharding.jit_on(mesh, lambda key: _random_params(model, key, trains_teacher))(key)
    params = load_params(
        find_release(weights).transformer or weights,
        model,
        key=key,
        precision="master" if trains_teacher else "training",
        shardings=sharding.tree_shardings(models.param_shapes(model), mesh),
    )
    return sharding.jit_on(mesh, lambda params: models.stack_params(params, model))(params)


def _random_params(model: ModelConfig, key: jax.Array, trains_teacher: bool) -> Params:
    params = models.init_stacked(model, key)
    if trains_teacher:
        return params
    # The head starts at zero, and such a teacher would predict zeros.
    head = params["head"]["linear"]
    xavier = jax.nn.initializers.xavier_uniform()
    head["kernel"] = xavier(jax.random.fold_in(key, 1), head["kernel"].shape)
    return models.cast_backbone(params, model)


def _teacher_start(config: Config, params: Params, mesh: jax.sharding.Mesh) -> Params:
    """Return the teacher's parameters among those of the model, stacked as the teacher's."""
    teacher = models.teacher_params(params, config.model)
    return sharding.jit_on(mesh, lambda p: _restack(p, config.model.teacher()))(teacher)


def _with_teacher(
    config: Config, params: Params, teacher: Params, mesh: jax.sharding.Mesh
) -> Params:
    """Return the model's parameters with those of a trained teacher, cast to compute."""
    make = lambda p: models.cast_backbone(_restack(p, config.model), config.model)
    return merge_params(params, sharding.jit_on(mesh, make)(teacher))


def _restack(params: Params, cfg: ModelConfig) -> Params:
    return models.stack_params(models.unstack_params(params), cfg)


def _read_trained(
    config: Config, phase: str, folder: epath.Path, mesh: jax.sharding.Mesh
) -> Params:
    """Read the parameters that a finished phase trained; stacked, on the mesh."""
    shapes, _ = saved_shapes(folder)
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for path, leaf in shapes.items()
        if phase == "teacher" or models.is_added(path)
    }
    shardings = sharding.tree_shardings(wanted, mesh)
    params, _ = load_params_folder(folder, shardings=shardings, paths=wanted)
    cfg = phase_model(config, phase)
    return sharding.jit_on(mesh, lambda params: models.stack_params(params, cfg))(params)


def _check_same_run(folder: epath.Path, config: Config) -> None:
    """Reject another run's folder: its finished phases would be taken for this run's."""
    theirs = read_json(folder / _CONFIG)
    if theirs is None:
        return
    here, there = _flat(as_json(to_config_dict(config))), _flat(theirs)
    fields = RESUMABLE_FIELDS if _is_amid_phase(folder) else RESUMABLE_FIELDS + _BETWEEN_PHASES
    for name in sorted(here.keys() | there.keys()):
        free = any(name == field or name.startswith(f"{field}.") for field in fields)
        if not free and here.get(name) != there.get(name):
            again = f"set {name}={there[name]} again, " if name in there else ""
            raise ConfigError(
                f"holds a run with {name}={there.get(name)}, now it is {here.get(name)}",
                field="train.workdir",
                value=folder,
                remedy=f"{again}name another folder, or remove it",
            )


def _is_amid_phase(folder: epath.Path) -> bool:
    """Tell whether a phase in this folder has checkpoints and is not finished."""
    # A ranking of layers trains a phase for each of them, one folder deeper.
    found = _checkpoints(folder, "*") + _checkpoints(folder, "*/*")
    return any(not (step.parents[1] / _SUMMARY).exists() for step in found)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested dict to {"a.b": value}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _write_json(path: epath.Path, content: Any) -> None:
    """Write a JSON file atomically."""
    if jax.process_index() == 0:
        write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
