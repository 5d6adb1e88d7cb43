"""Counts the instruction bundles of the TPU kernels' final schedules, without a TPU.

    python benchmarks/tpu_schedules.py --out=benchmarks/results/tpu_schedules.json

A TPU core issues one bundle a cycle. The kernels have no inner loop, so the number of bundles is
about that of the cycles of one grid step (a chunk of tokens of a group of heads) without stalls:
good for comparing two schedules, not for absolute time. Needs libtpu, which compiles without a
chip and writes its schedules to a folder.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shutil
import tempfile
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from pallas_kernels.gated_delta import tpu, tpu_forward
from pallas_kernels.gated_delta.plan import Plan
from pallas_kernels.gated_delta.shapes import SHAPES, Shape

_SHAPE = flags.DEFINE_enum("shape", "wan1p3b_block", list(SHAPES), "A named shape.")
_OUT = flags.DEFINE_string("out", None, "JSON file to write.")

_CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def lower(shape: Shape, chunk_size: int, device: Any) -> dict[str, jax.stages.Lowered]:
    """The forward and the backward pass in bfloat16, lowered for a device."""
    plan = Plan(shape.block_size, chunk_size, jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))

    def array(*sizes: int, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=SingleDeviceSharding(device))

    batch, heads, state = shape.batch, shape.heads, (shape.key_dim, shape.value_dim)
    k, v = (array(batch, shape.time, heads, dim, dtype=jnp.bfloat16) for dim in state)
    gates = array(batch, shape.time, heads)
    inputs = (k, v, gates, gates, array(batch, heads, *state))
    dstates = array(batch, shape.blocks + 1, heads, *state)
    forward = jax.jit(lambda *args: tpu.forward(plan, *args)[0])
    backward = jax.jit(lambda *args: tpu.backward(plan, args[:5], args[5]))
    return {"forward": forward.lower(*inputs), "backward": backward.lower(*inputs, dstates)}


def one_head_after_another():
    """The naive order: a head climbs all levels of its inverse before the next one begins."""

    def inverses(numerics, ms):
        return [together(numerics, [m])[0] for m in ms]

    together = tpu_forward.inverses
    return mock.patch.object(tpu_forward, "inverses", inverses)


def bundles(lowered: jax.stages.Lowered, dump: pathlib.Path) -> dict[str, int]:
    """Bundles of each kernel of a program, by the kernel's name."""
    shutil.rmtree(dump, ignore_errors=True)
    dump.mkdir()
    lowered.compile()
    counts = {}
    for path in dump.glob("*gated_delta_*-final_bundles.txt"):
        if "schedule-analysis" not in path.name:
            name = re.findall(r"gated_delta_[a-z]+", path.name)[0]
            counts[name] = len(re.findall(r"^ *(?:0x[0-9a-f]+|0) .*:", path.read_text(), re.M))
    return counts


def measure(shape: Shape, chip: str, chunk_size: int, dump: pathlib.Path) -> dict:
    """Bundles a grid step in both orders, and the same for 64 tokens."""
    device = topologies.get_topology_desc(_CHIPS[chip], "tpu").devices[0]
    lowered = lower(shape, chunk_size, device)
    with one_head_after_another():
        naive = lower(shape, chunk_size, device)["forward"]
    forward = bundles(lowered["forward"], dump)["gated_delta_forward"]
    backward = bundles(lowered["backward"], dump)
    steps = {
        "forward": forward,
        "forward_one_head_after_another": bundles(naive, dump)["gated_delta_forward"],
        "backward_chunk_matrices": backward["gated_delta_forward"],
        "backward_gradients": backward["gated_delta_backward"],
    }
    per_64 = {name: round(count * 64 / chunk_size) for name, count in steps.items()}
    return {"chip": chip, "chunk": chunk_size, "a_step": steps, "per_64_tokens": per_64}


def main(_) -> None:
    """Count for every chip and chunk size."""
    shape = SHAPES[_SHAPE.value]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        dump = pathlib.Path(folder) / "dump"
        # Before libtpu is loaded, which is when the first chip is described.
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
        }
        for chip in _CHIPS:
            for chunk_size in (64, 128):
                results.append(measure(shape, chip, chunk_size, dump))
                print(json.dumps(results[-1]), flush=True)
    report = {
        "shape": {"name": _SHAPE.value, **vars(shape)},
        "dtype": "bfloat16",
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")},
        "bundles": results,
    }
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
