"""Times blocks of generation at the shapes of Wan2.1 1.3B, by memory, capacity and position.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.97 python benchmarks/block_times.py \
        --out=benchmarks/results/block_times_h100.json

A block is four denoising passes and the clean one, of 3 latent frames of 480 x 832 pixels, batch 1,
with random weights. Its time depends on how many frames are visible, not on what is in them, so
the position is set and the frames before it are not generated. Timed: wall time with results waited
for, after one call that compiles. The compiled block is searched for copies of a cache first.

--cases names some of the cases; --small is for a look at the script itself on a CPU.
"""

import importlib.metadata
import json
import platform
import re
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import arl2_jax as arl2

_OUT = flags.DEFINE_string("out", "", "JSON file to write.")
_CASES = flags.DEFINE_list("cases", [], "Cases to time; by default all.")
_REPEAT = flags.DEFINE_integer("repeat", 5, "Timed calls at each position.")
_SMALL = flags.DEFINE_bool("small", False, "Tiny sizes.")

WINDOW = {"kind": "window", "settings": {"sink": 3, "frames": 9}}
# Hybrid layers of 30, other memories, latent frames of room.
CASES = {
    "hybrid_22_room_21": (22, (), 21),
    "hybrid_22_room_231": (22, (), 231),
    "hybrid_22_window_8": (22, (WINDOW,), None),
    "hybrid_30": (30, (), None),
    "softmax_room_231": (0, (), 231),
}
POSITIONS = (0, 3, 84, 225)


def model(hybrid: int, memories: tuple) -> arl2.ModelConfig:
    """The model of a case."""
    others = {"memories": memories} if memories else {}
    if _SMALL.value:
        layers = {0: (), 22: (0,), 30: (0, 1, 2)}[hybrid]
        return arl2.ModelConfig.tiny(hybrid_layers=layers, frames_per_block=3, **others)
    return arl2.ModelConfig.wan1p3b(hybrid_layers=tuple(range(hybrid)), **others)


def time_case(hybrid: int, memories: tuple, room: int | None) -> dict:
    """Block times at all positions that the room has, peak memory, and copies of a cache."""
    cfg, peak_before = model(hybrid, memories), peak_bytes()
    rows, columns = (4, 6) if _SMALL.value else (60, 104)
    params = jax.jit(lambda key: half(arl2.init_params(cfg, key), cfg))(jax.random.key(0))
    generator = arl2.Generator(
        cfg, params, arl2.SamplerConfig(), latent_shape=(rows, columns, cfg.in_dim)
    )
    del params
    text = jnp.zeros((1, cfg.text_len, cfg.text_dim))
    frames = room or (None if hasattr(cfg, "memories") else 0)  # also runs on earlier versions
    context, state = generator._start(
        generator._params, text, None, jax.random.key(1, impl="rbg"), frames=frames
    )
    cache = max((x for x in jax.tree.leaves(state.memory)), key=lambda x: x.size)
    start = time.perf_counter()
    program = generator._next.lower(context, *state, cfg=cfg).compile()
    compile_seconds = time.perf_counter() - start
    found = {
        "cache": f"{cache.dtype}{list(cache.shape)}",
        "memory_bytes": sum(x.nbytes for x in jax.tree.leaves(state.memory)),
        "copies_of_a_cache": cache_copies(program.as_text(), cache),
        "compile_seconds": compile_seconds,
        "seconds": {},
    }
    end = room or POSITIONS[-1] + 3
    for position in (p for p in POSITIONS if p + 3 <= end):
        seconds = []
        for _ in range(_REPEAT.value + 1):
            state = state._replace(position=jnp.int32(position))
            start = time.perf_counter()
            state, block = jax.block_until_ready(generator._next(context, *state, cfg=cfg))
            seconds.append(time.perf_counter() - start)
        assert bool(jnp.isfinite(block).all())
        found["seconds"][str(position)] = {
            "median": float(np.median(seconds[1:])), "min": min(seconds[1:]),
            "max": max(seconds[1:]),
        }  # fmt: skip
    # Devices know the peak of the process; where an earlier case had it, that of this one is lower.
    peak = peak_bytes()
    return found | {"peak_bytes": peak if peak != peak_before else None}


def peak_bytes() -> int | None:
    """Most memory that was in use since the process began."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def half(params, cfg: arl2.ModelConfig):
    """Parameters in the types in which they are computed with."""
    from arl2_jax.models import cast_params

    return cast_params(params, cfg)


def cache_copies(text: str, cache: jax.Array) -> dict[str, int]:
    """Count instructions that make an array of the size of a run's caches, or of one layer's.

    In-place updates are none of them, nor are the loops and tuples that hand a cache on.
    """
    kind = {"bfloat16": "bf16", "float32": "f32"}[str(cache.dtype)]
    layers, *one = cache.shape
    one = ",".join(map(str, one))
    counts: dict[str, int] = {}
    for of, shape in (("all layers", f"{layers},{one}"), ("one layer", rf"(?:1,)?{one}")):
        for line in re.findall(rf"= {kind}\[{shape}\]\S* (.*)", text):
            name = line.split("(")[0]
            update = "dynamic-update-slice" in line or "dynamic_update_slice" in line
            passed = name in ("parameter", "get-tuple-element", "bitcast", "while", "tuple")
            if not (passed or update):
                label = f"{name} of {of}"
                counts[label] = counts.get(label, 0) + 1
    return counts


def main(_):
    """Run the cases one after the other; each has the device to itself."""
    device = jax.devices()[0]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "what": "blocks of generation, Wan2.1 1.3B with random weights, 3 latent frames of 480 x "
        "832, batch 1, four denoising passes and the clean one",
        "timed": f"wall time of {_REPEAT.value} calls with results waited for, by position of the "
        "block's first latent frame; compilation apart",
        "device": {"platform": device.platform, "kind": device.device_kind},
        "commit": commit.stdout.strip() or None,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "cases": {},
    }
    for name in _CASES.value or CASES:
        try:
            result["cases"][name] = time_case(*CASES[name])
        except jax.errors.JaxRuntimeError as error:
            result["cases"][name] = {"failed": str(error).splitlines()[0]}
        jax.clear_caches()
        print(name, json.dumps(result["cases"][name]), flush=True)
        if _OUT.value:
            with open(_OUT.value, "w") as file:
                file.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
