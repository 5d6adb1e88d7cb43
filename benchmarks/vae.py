"""Times Wan's video autoencoder with random weights: whole clips, and a stream of latent frames.

    python benchmarks/vae.py --out=benchmarks/results/vae_h200.json
    python benchmarks/vae.py --rows=64 --columns=64 --frames=9 --dtype=float32     # on a CPU

Operations are counted before XLA's optimizations, so that they do not depend on the device; what
tiles compute twice does not count.
"""

import importlib.metadata
import json
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from etils import epath

from arl2_jax.config import VAEConfig
from arl2_jax.models import vae

_ROWS = flags.DEFINE_integer("rows", 480, "Rows of pixels.")
_COLUMNS = flags.DEFINE_integer("columns", 832, "Columns of pixels.")
_FRAMES = flags.DEFINE_integer("frames", 81, "Pixel frames, 1 + a multiple of 4.")
_BATCH = flags.DEFINE_integer("batch", 1, "Videos coded together.")
_TILE = flags.DEFINE_list("tile", None, "Rows and columns of latents in a tile; default: all.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Compute type.")
_REPEAT = flags.DEFINE_integer("repeat", 5, "Timed calls of each function.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")


def measure(function, *arguments, frames: int, flop: float) -> dict:
    """Compiles a function and times it.

    Args:
      function: arguments -> arrays.
      arguments: on the device.
      frames: pixel frames that a call works on, all videos together.
      flop: operations of a call.
    """
    start = time.perf_counter()
    program = jax.jit(function).lower(*arguments).compile()
    compiled = time.perf_counter() - start
    result = program(*arguments)
    finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(result))
    del result
    seconds = []
    for _ in range(_REPEAT.value):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - start)
    median = float(np.median(seconds))
    return {
        "finite": finite,
        "compile_seconds": compiled,
        "seconds": {"median": median, "min": min(seconds), "max": max(seconds)},
        "frames_per_second": frames / median,
        "tflop": flop / 1e12,
        "tflop_per_second": flop / median / 1e12,
        "temporary_gib": program.memory_analysis().temp_size_in_bytes / 2**30,
    }


def frame_flop(function, params, cfg: VAEConfig, first_frame, later_frame, state) -> list[float]:
    """Operations of a video's first latent frame and of each later one."""
    # Only the CPU's backend counts before compilation.
    place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    on_cpu = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    jitted = jax.jit(function, static_argnums=1, static_argnames="first")
    params, first_frame, later_frame, state = jax.tree.map(
        on_cpu, (params, first_frame, later_frame, state)
    )
    lowered = [
        jitted.lower(params, cfg, frame, state, first=first)
        for frame, first in ((first_frame, True), (later_frame, False))
    ]
    return [one.cost_analysis()["flops"] for one in lowered]


def measure_all(cfg: VAEConfig) -> dict:
    """Encoding and decoding of a clip, and decoding of one latent frame of a stream."""
    params = vae.init_vae(cfg, jax.random.key(0))
    shape = (_BATCH.value, _FRAMES.value, _ROWS.value, _COLUMNS.value, 3)
    pixels = jax.random.uniform(jax.random.key(1), shape, minval=-1, maxval=1)
    tile = tuple(int(size) for size in _TILE.value) if _TILE.value else None
    encode = lambda params, pixels: vae.encode(params, cfg, pixels, tile=tile)
    decode = lambda params, latents: vae.decode(params, cfg, latents, tile=tile)
    stream = lambda params, latent, state: vae.decode_frame(params, cfg, latent, state, first=False)

    size = jax.eval_shape(encode, params, pixels).shape
    latents = jax.random.normal(jax.random.key(2), size)
    batch, count, rows, columns, _ = size
    state = vae.init_encoder_state(cfg, batch, rows, columns)
    start, later = pixels[:, :1], pixels[:, 1 : 1 + cfg.temporal_factor]
    encode_flop = frame_flop(vae.encode_frame, params, cfg, start, later, state)
    state = vae.init_decoder_state(cfg, batch, rows, columns)
    decode_flop = frame_flop(vae.decode_frame, params, cfg, latents[:, 0], latents[:, 0], state)
    clip = lambda flop: flop[0] + (count - 1) * flop[1]
    frames = batch * _FRAMES.value
    return {
        "encode": measure(encode, params, pixels, frames=frames, flop=clip(encode_flop)),
        "decode": measure(decode, params, latents, frames=frames, flop=clip(decode_flop)),
        "decode_frame": measure(
            stream, params, latents[:, 0], state,
            frames=batch * cfg.temporal_factor, flop=decode_flop[1],
        ),
        "decoder_state_gib": sum(x.nbytes for x in jax.tree.leaves(state)) / 2**30,
    }  # fmt: skip


def main(_):
    """Run all and write the JSON."""
    device = jax.devices()[0]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "what": "the released autoencoder's shapes with random weights",
        "timed": f"wall time of {_REPEAT.value} calls behind a first one, results waited for; "
        "compilation apart",
        "shapes": {
            "pixels": [_BATCH.value, _FRAMES.value, _ROWS.value, _COLUMNS.value, 3],
            "tile": _TILE.value,
            "dtype": _DTYPE.value,
        },
        "device": {"platform": device.platform, "kind": device.device_kind},
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        **measure_all(VAEConfig(dtype=_DTYPE.value)),
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if _OUT.value:
        epath.Path(_OUT.value).write_text(text + "\n")


if __name__ == "__main__":
    app.run(main)
