"""Times the optimizer steps of both stages at the shapes of Wan2.1 1.3B, with random weights.

    PYTHONPATH=. python benchmarks/step_times.py --out=benchmarks/results/step_times_h100.json

One clip of 21 latent frames of 480 x 832 pixels, 22 of 30 layers hybrid, settings of
configs/wan1p3b.py. Timed: wall time of single steps, waiting for results, after an uncounted first
one; without compilation. --small tries the script itself on a CPU.
"""

import dataclasses
import importlib.metadata
import json
import platform
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from arl2_jax import models
from arl2_jax.config import from_config_dict
from arl2_jax.training.partition import TRAINED, split_params
from arl2_jax.training.step import init_state, make_step
from configs import tiny, wan1p3b

_OUT = flags.DEFINE_string("out", "", "JSON file to write.")
_COMMIT = flags.DEFINE_string("commit", "", "Commit of what is timed.")
_REPEAT = flags.DEFINE_integer("repeat", 8, "Timed steps.")
_SMALL = flags.DEFINE_bool("small", False, "Tiny sizes.")

_CASES = flags.DEFINE_list("cases", ["stage1", "stage2", "stage2_no_layer_loss"], "Of CASES.")

CASES = {
    "stage1": ("stage1", 0.0),
    "stage2": ("stage2", 0.1),
    "stage2_no_layer_loss": ("stage2", 0),
}


def run_config(phase: str, layer_loss: float):
    """The run of configs/wan1p3b.py with one clip a step."""
    fields: Any = tiny.get_config() if _SMALL.value else wan1p3b.get_config("random")
    fields.stage1.batch_size = fields.stage2.batch_size = 1
    fields.stage1.accumulation = fields.stage2.accumulation = 1
    fields.stage2.layer_loss = float(layer_loss)
    config = from_config_dict(fields)
    return dataclasses.replace(config, phases=(phase,))


def working_params(cfg, key):
    """Random parameters as training holds them."""
    params = models.init_stacked(cfg, key)
    # Untrained, the head predicts zero, and no gradient goes past it.
    kernel = params["head"]["linear"]["kernel"]
    params["head"]["linear"]["kernel"] = 0.02 * jax.random.normal(jax.random.key(3), kernel.shape)
    return models.cast_backbone(params, cfg)


def time_step(phase: str, layer_loss: float) -> dict:
    """Seconds of a step, its compilation, peak memory and the first loss."""
    config = run_config(phase, layer_loss)
    cfg, (rows, columns, channels) = config.model, config.latent_shape
    params = jax.jit(working_params, static_argnums=0)(cfg, jax.random.key(0))
    trained, frozen = split_params(params, TRAINED[phase])
    state = init_state(config, phase, trained, jax.random.key(1, impl="rbg"))
    del params, trained
    shape = (1, config.data.frames, rows, columns, channels)
    batch = {
        "latents": jax.random.normal(jax.random.key(2), shape),
        "text": jnp.ones((1, cfg.text_len, cfg.text_dim)),
    }
    start = time.perf_counter()
    step = jax.jit(make_step(config, phase), donate_argnums=0).lower(state, frozen, batch).compile()
    compile_seconds, seconds, losses = time.perf_counter() - start, [], []
    for _ in range(_REPEAT.value + 1):
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, frozen, batch))
        seconds.append(time.perf_counter() - start)
        losses.append(float(metrics["loss"]))
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        "seconds": {"median": float(np.median(seconds[1:])), "min": min(seconds[1:]),
                    "max": max(seconds[1:])},
        "compile_seconds": compile_seconds,
        "program_bytes": len(step.as_text()),
        "losses": losses,
        "latents": list(shape),
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }  # fmt: skip


def main(_):
    """Times the cases one after the other."""
    device, cases = jax.devices()[0], {}
    for name in _CASES.value:
        cases[name] = time_step(*CASES[name])
        jax.clear_caches()
        print(name, json.dumps(cases[name]), flush=True)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "what": "optimizer steps of both stages, one clip, random weights, settings of "
        "configs/wan1p3b.py",
        "timed": f"wall time of {_REPEAT.value} single steps with results waited for; compilation "
        "apart",
        "device": {"platform": device.platform, "kind": device.device_kind},
        "commit": _COMMIT.value or None,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "cases": cases,
    }
    if _OUT.value:
        with open(_OUT.value, "w") as file:
            file.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
