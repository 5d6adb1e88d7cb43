"""Steps of stage 1 that its start by least squares saves, on the tiny task.

    PYTHONPATH=. python benchmarks/closed_form_start.py --workdir=runs/teacher \
        --out=benchmarks/results/closed_form_cpu.json

A teacher of configs/tiny.py is trained once in the folder, or read from it. Then stage 1 runs from
random starts and from fits of `stage1.start_clips` clips, with weights, clips and noise by seed.
Errors are the loss of stage 1 on held-out clips, averaged over the hybrid layers, with the averaged
parameters that the stage would return. The run of a fit has a shorter schedule of `--short` steps;
so has one further random start.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from device_time import describe_device
from etils import epath

from arl2_jax import models
from arl2_jax.config import Config, from_config_dict
from arl2_jax.data import ClipData, open_data
from arl2_jax.models import Params
from arl2_jax.training import losses
from arl2_jax.training.partition import TRAINED, merge_params, split_params
from arl2_jax.training.pipeline import convert, prepare
from arl2_jax.training.start import least_squares_start
from arl2_jax.training.step import init_state, make_step
from arl2_jax.weights.folder import load_params_folder
from configs import tiny

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the teacher.", required=True)
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")
_SEEDS = flags.DEFINE_list("seeds", ["0", "1"], "Seeds of students, clips and noise.")
_TEACHER_STEPS = flags.DEFINE_integer("teacher_steps", 500, "Optimizer steps of the teacher.")
_STEPS = flags.DEFINE_integer("steps", 120, "Steps from the random start.")
_SHORT = flags.DEFINE_integer("short", 40, "Steps from the fit, and of one more random start.")
_EVERY = flags.DEFINE_integer("every", 4, "Steps between two tests.")
_CLIPS = flags.DEFINE_integer("start_clips", 64, "Clips of the fit.")
_TEST_CLIPS = 64


def main(_):
    """Train from both starts, print errors and write them as JSON."""
    teacher = _teacher()
    rows = []
    for memory_init in ("published", "by_block"):
        config = _config(memory_init=memory_init)
        for seed in map(int, _SEEDS.value):
            row = {"memory_init": memory_init, "seed": seed} | compare(config, teacher, seed)
            rows.append(row)
            print({k: v for k, v in row.items() if k != "curves"}, flush=True)
            if _OUT.value:
                _write(rows, config)


def _config(**model: Any) -> Config:
    config = from_config_dict(tiny.get_config())
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


def _teacher() -> Params:
    """The teacher's parameters, trained where the folder has none."""
    config = _config()
    config = dataclasses.replace(
        config,
        model=config.model.teacher(),
        phases=("teacher",),
        teacher=dataclasses.replace(config.teacher, steps=_TEACHER_STEPS.value),
        train=dataclasses.replace(config.train, workdir=_WORKDIR.value),
    )
    weights = epath.Path(_WORKDIR.value) / "teacher" / "weights"
    if not weights.exists():
        convert(config, *prepare(config))
    return jax.tree.map(jnp.asarray, load_params_folder(weights)[0])


def compare(config: Config, teacher: Params, seed: int) -> dict[str, Any]:
    """Errors of one seed from both starts, and the steps to the error of the random one."""
    params = models.init_params(config.model, jax.random.key(seed))
    params = teacher | {
        "blocks": {i: layer | _delta(params, i) for i, layer in teacher["blocks"].items()}
    }
    data = open_data(config)
    test = _noised(config, data.held_out(_TEST_CLIPS), jax.random.key(10**6))
    fit_key, noise_key = jax.random.split(jax.random.key(seed))
    batches = data.train_batches(config.stage1.batch_size, seed)
    clips = [
        _noised(config, next(batches), jax.random.fold_in(noise_key, i))
        for i in range(_CLIPS.value // config.stage1.batch_size)
    ]
    began = time.perf_counter()
    fitted, errors = least_squares_start(params, config.model, clips, fit_key)
    seconds = time.perf_counter() - began
    _check(config, params, fitted, clips, errors)
    curves = {
        "random": train(config, params, data, test, seed, _STEPS.value),
        "random, short": train(config, params, data, test, seed, _SHORT.value),
        "least squares": train(config, fitted, data, test, seed, _SHORT.value),
    }
    wanted = curves["random"]["mean"][-1]
    found = curves["least squares"]
    reached = [n for n, e in zip(found["steps"], found["mean"], strict=True) if e <= wanted]
    steps, means = curves["random"]["steps"], curves["random"]["mean"]
    worth = [n for n, e in zip(steps, means, strict=True) if e <= found["mean"][0]]
    return {
        "error_of_start": {name: curve["mean"][0] for name, curve in curves.items()},
        "last_error": {name: curve["mean"][-1] for name, curve in curves.items()},
        "steps_to_last_error_of_random": reached[0] if reached else None,
        "random_steps_to_error_of_fit": worth[0] if worth else None,
        "fit": {
            "seconds": seconds,
            "layers": {layer: each._asdict() for layer, each in errors.items()},
        },
        "curves": curves,
    }


def _delta(params: Params, layer: str) -> Params:
    found = params["blocks"][layer]
    return {"delta": found["delta"]} if "delta" in found else {}


_noise = jax.jit(losses.noise_clip, static_argnums=(1, 4))
_distill = jax.jit(losses.distill_layers, static_argnums=1)


def _noised(config: Config, batch: Any, key: jax.Array) -> losses.NoisedClip:
    latents, text = (jnp.asarray(batch[name]) for name in ("latents", "text"))
    return _noise(key, config.model.teacher(), latents, text, config.sampler)


def _check(config: Config, params: Params, fitted: Params, clips, errors) -> None:
    """The fit's errors must be those of the loss of stage 1, and none may rise."""
    for tree, name in ((params, "before"), (fitted, "after")):
        found = [_distill(tree, config.model, clip).errors for clip in clips]
        for layer, each in errors.items():
            mean = np.mean([float(error[layer]) for error in found])
            np.testing.assert_allclose(getattr(each, name), mean, rtol=1e-3)
    if any(each.after > each.before for each in errors.values()):
        raise AssertionError(f"the fit has raised an error: {errors}")


def train(
    config: Config, params: Params, data: ClipData, test, seed: int, steps: int
) -> dict[str, list]:
    """Errors on the test clips while stage 1 trains, a list each; "mean" is over layers."""
    warmup = min(config.stage1.warmup, steps // 4)
    stage1 = dataclasses.replace(config.stage1, steps=steps, warmup=warmup)
    config = dataclasses.replace(config, stage1=stage1)
    stacked = models.stack_params(params, config.model)
    trained, frozen = split_params(stacked, TRAINED["stage1"])
    state = init_state(config, "stage1", trained, jax.random.key(seed))
    step = jax.jit(make_step(config, "stage1"))
    batches = data.train_batches(stage1.batch_size, seed)
    result: dict[str, list] = {"steps": [], "mean": []}
    for i in range(steps + 1):
        if i % _EVERY.value == 0 or i == steps:
            errors = _distill(merge_params(state.ema, frozen), config.model, test).errors
            result["steps"].append(i)
            result["mean"].append(float(np.mean([float(e) for e in errors.values()])))
            for layer, error in errors.items():
                result.setdefault(f"layer {layer}", []).append(float(error))
        if i < steps:
            batch = {name: jnp.asarray(x) for name, x in next(batches).items()}
            state, _ = step(state, frozen, batch)
    logging.info("%d steps: error %.4f", steps, result["mean"][-1])
    return result


def _write(rows: list[dict[str, Any]], config: Config) -> None:
    model = config.model
    result = {
        "what": "relative squared error of stage 1, mean over hybrid layers, on held-out clips",
        "shapes": {
            "dim": model.dim,
            "heads": model.num_heads,
            "hybrid_layers": list(model.hybrid_layers),
            "tokens_per_block": model.frames_per_block * config.tokens_per_frame,
            "blocks": config.blocks,
            "batch_size": config.stage1.batch_size,
            "learning_rate": config.stage1.learning_rate,
            "test_clips": _TEST_CLIPS,
            "dtype": model.dtype,
        },
        "settings": {
            "teacher_steps": _TEACHER_STEPS.value,
            "steps": _STEPS.value,
            "short": _SHORT.value,
            "start_clips": _CLIPS.value,
        },
        **describe_device(),
        "runs": rows,
    }
    Path(_OUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
