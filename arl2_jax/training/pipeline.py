"""The whole run: phases in order, the controls, and what the report needs of them."""

import dataclasses
import json
import math
from typing import Any

import jax
from absl import logging
from etils import epath

from arl2_jax import models, sharding
from arl2_jax.config import Config, ConfigError, to_config_dict, with_steps
from arl2_jax.data import ClipData, open_data, open_short_data
from arl2_jax.models import Params
from arl2_jax.storage import OTHER_FOLDER, check_writable, write_whole
from arl2_jax.training.loop import read_json, run_phase
from arl2_jax.training.partition import merge_params, split_params
from arl2_jax.training.retention import record_retention
from arl2_jax.training.start import start_stage1
from arl2_jax.weights import find_release, load_params
from arl2_jax.weights.folder import load_params_folder, save_params

_CONFIG = "config.json"
# What may change between two starts of one run: it decides nothing about the trained weights.
_FREE = ("train.log_every", "train.checkpoint_every", "train.keep", "train.mesh", "train.workdir",
         "evaluation", "data.workers", "data.held_out")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Converted:
    """The models of a finished run, each a complete parameter tree.

    Attributes:
      untrained: the hybrid before conversion; its softmax weights are the teacher's.
      stage1, stage2: the hybrid after each stage; None if the run leaves the stage out.
      control: the hybrid with its memory gate at zero, trained like the student; or None.
      control_local: the same with what is trained acting on the softmax inside the block; or None.
      seconds, compile_seconds: wall time per phase, compilation apart.
    """

    untrained: Params
    stage1: Params | None
    stage2: Params | None
    control: Params | None
    control_local: Params | None
    seconds: dict[str, float]
    compile_seconds: dict[str, float]


def prepare(config: Config, *, remedy: str = OTHER_FOLDER) -> tuple[epath.Path, ClipData, Params]:
    """Checks everything that can be checked before compiling: folder, data, weights, mesh.

    Args:
      config: the run.
      remedy: what its user can do where the folder cannot be taken.

    Returns:
      The run's folder, its clips, and the parameters it starts from.

    Raises:
      ConfigError: one line naming the field or file, its value and the remedy.
    """
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
    _check_same_run(folder, config, remedy)
    data = open_data(config)
    check_writable(folder, remedy=remedy)
    params = _initial_params(config, mesh)
    _write_json(folder / _CONFIG, to_config_dict(config))
    if mesh.size > 1:
        logging.info("parameters on %d devices:\n%s", mesh.size, table)
    return folder, data, params


def convert(config: Config, folder: epath.Path, data: ClipData, params: Params) -> Converted:
    """Runs the phases that are not yet finished in `folder`.

    Args:
      config: the run.
      folder, data, params: as `prepare` returns them.
    """
    mesh = sharding.make_mesh(config.train.mesh)
    params = sharding.put(params, sharding.tree_shardings(params, mesh))
    seconds, compile_seconds = {}, {}

    def phase(name: str, start: Params, *, config=config, title=None) -> Params:
        title = title or name
        place = folder / title
        summary = read_json(place / "summary.json")
        if summary is None:
            if name == "stage1":
                start = start_stage1(config, start, data, mesh, place)
            result = run_phase(config, name, start, data, mesh, place, title=title)
            model = config.model.teacher() if name == "teacher" else config.model
            save_params(place / "weights", result.params, to_config_dict(model))
            summary = {"seconds": result.seconds, "compile_seconds": result.compile_seconds}
            _write_json(place / "summary.json", summary)
            trained = result.params
        else:
            logging.info("%s is finished in %s; its weights are read from there", title, place)
            trained = load_params_folder(place / "weights")[0]
            trained = sharding.put(trained, sharding.tree_shardings(trained, mesh))
        seconds[title] = summary["seconds"]
        compile_seconds[title] = summary["compile_seconds"]
        return trained

    if "teacher" in config.phases:
        delta, _ = split_params(params, "/delta/")
        params = merge_params(phase("teacher", models.without_delta(params)), delta)
    untrained, stages = params, {}
    record_retention(config, untrained, data, folder, warn=True)
    for name in ("stage1", "stage2"):
        if name in config.phases:
            params = stages[name] = phase(name, params)
            record_retention(config, params, data, folder / name)
    controls = {}
    for gate in config.evaluation.controls if "stage2" in config.phases else ():
        title = control_name(gate)
        closed = control_config(config, gate)
        controls[title] = phase("stage2", untrained, config=closed, title=title)
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
    """The run of a control without memory: the student's stage 2, from the untrained hybrid.

    A closed gate leaves stage 1 nothing to learn: all its gradients are zero. The local control is
    trained by the same recipe, for stage2.control_share of its steps.
    """
    steps = math.ceil(config.stage2.control_share * config.stage2.steps)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, memory_gate=memory_gate),
        stage1=dataclasses.replace(config.stage1, start="random"),
        stage2=dataclasses.replace(with_steps(config.stage2, steps), layer_loss=0.0),
    )


def control_name(memory_gate: str) -> str:
    """Name of a control, in `Converted` and of its folder, by its model.memory_gate."""
    return "control" if memory_gate == "zero" else f"control_{memory_gate}"


def _initial_params(config: Config, mesh: jax.sharding.Mesh) -> Params:
    key = jax.random.key(config.train.seed)
    weights = config.teacher.weights
    if weights != "random":
        weights = find_release(weights).transformer or weights
        layout = sharding.tree_shardings(models.param_shapes(config.model), mesh)
        return load_params(weights, config.model, key=key, shardings=layout)
    params = models.init_params(config.model, key)
    if "teacher" not in config.phases:
        # The head starts at zero, and a teacher that stays so has nothing to teach.
        head = params["head"]["linear"]
        xavier = jax.nn.initializers.xavier_uniform()
        head["kernel"] = xavier(jax.random.fold_in(key, 1), head["kernel"].shape)
    return params


def _check_same_run(folder: epath.Path, config: Config, remedy: str) -> None:
    """Refuses a folder of another run: its finished phases would be taken for this one's."""
    theirs = read_json(folder / _CONFIG)
    if theirs is None:
        return
    here, there = _flat(json.loads(json.dumps(to_config_dict(config)))), _flat(theirs)
    for name in sorted(here.keys() | there.keys()):
        free = any(name == f or name.startswith(f"{f}.") for f in _FREE)
        if not free and here.get(name) != there.get(name):
            raise ConfigError(
                f"train.workdir={folder} holds a run with {name}={there.get(name)}, now it is "
                f"{here.get(name)}; {remedy}, or remove it"
            )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"a.b": value}."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _write_json(path: epath.Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    if jax.process_index() == 0:
        write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
