"""Device time of a jitted function, and the peaks of the device it runs on.

A kernel takes 10 to 300 microseconds and its dispatch from Python about 10, so one call at a time
would measure the host. Calls are therefore enqueued without waiting, as many as take at least
`_SAMPLE_SECONDS`, and waited for once: while the device computes one, the host prepares the next.
Time per call is that of such a sample over its calls; nothing is subtracted. Calls take turns over
several sets of arguments that together exceed the device's cache, so that each reads from memory.

Two figures show whether the device was kept busy. `host_share` is the time in which the host
enqueues a few calls over the time until they are done: near 1, the host was the slower and the time
is an upper bound. `busy_seconds`, on a GPU and where asked for, is the time per call in which a
kernel ran at all, by the profiler.

Many calls in one program would hide dispatch too, but XLA removes barriers between them and then
interleaves their parts.
"""

import functools
import glob
import importlib.metadata
import itertools
import math
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_SAMPLE_SECONDS = 0.02
# Above the last cache of the devices here: 50 and 60 MB on H100 and H200, 128 MB of VMEM on TPUs.
_CACHE_BYTES = 128e6
_MOST_SETS = 6


def sets_beyond_cache(size: float) -> int:
    """How many argument sets of `size` bytes do not fit the cache together; 2 to 6."""
    return min(max(2, math.ceil(_CACHE_BYTES / size)), _MOST_SETS)


def measure(
    function: Callable[..., Any], sets: Sequence[tuple], repeats: int, profile: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Times a function; returns its result for the first set, and the figures.

    Args:
      function: arrays -> arrays.
      sets: argument tuples of equal shapes, different values.
      repeats: timed samples, after calls that warm up.
      profile: also ask the profiler, on a GPU.
    """
    start = time.perf_counter()
    program = jax.jit(function).lower(*sets[0]).compile()
    compiled = time.perf_counter() - start
    first = jax.block_until_ready(program(*sets[0]))
    _enqueue(program, sets, len(sets))
    count = math.ceil(_SAMPLE_SECONDS * len(sets) / _enqueue(program, sets, len(sets))[1])
    seconds = np.array([_enqueue(program, sets, count)[1] / count for _ in range(repeats)])
    # Few enough that the runtime, which lets some dozens wait, does not hold the host up.
    enqueued, done = _enqueue(program, sets, 16)
    figures = {
        "seconds": summary(seconds),
        "samples": repeats,
        "calls_a_sample": count,
        "argument_sets": len(sets),
        "bytes_of_a_set": sum(x.nbytes for x in jax.tree.leaves(sets[0])),
        "host_share": enqueued / done,
        "compile_seconds": compiled,
    }
    if profile and jax.default_backend() == "gpu":
        figures["busy_seconds"] = _busy_seconds(program, sets, 16)
    return first, figures


def summary(seconds: np.ndarray) -> dict[str, float]:
    """Median and range of samples."""
    return {
        "median": float(np.median(seconds)),
        "min": float(seconds.min()),
        "max": float(seconds.max()),
    }


def measure_peaks() -> dict[str, float]:
    """Operations of matrix products and bytes of copies a second, as this device does them."""
    size, elements = (512, 2**22) if jax.default_backend() == "cpu" else (8192, 2**29)
    keys = jax.random.split(jax.random.key(0), 3)
    peaks = {}
    precisions = {"bfloat16": lax.Precision.DEFAULT, "float32": lax.Precision.HIGHEST}
    for dtype, precision in precisions.items():
        sets = [tuple(jax.random.normal(k, (2, size, size), dtype)) for k in keys]
        _, found = measure(functools.partial(jnp.matmul, precision=precision), sets, 5)
        peaks[f"{dtype}_flop_per_second"] = 2 * size**3 / found["seconds"]["median"]
    sets = [(jax.random.normal(k, (elements,), "bfloat16"),) for k in keys]
    # A copy as a kernel makes it; XLA would leave out one that changes nothing.
    _, found = measure(jnp.negative, sets, 5)
    peaks["bytes_per_second"] = 2 * sets[0][0].nbytes / found["seconds"]["median"]
    return peaks


def describe_device() -> dict[str, Any]:
    """What ran here: device, driver, versions of Python and packages."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "torch", "triton", "fla-core", "flash-linear-attention")
    return {
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "runtime": device.client.platform_version.splitlines()[0],
            "driver": _driver(),
        },
        "versions": {"python": platform.python_version()}
        | {name: version for name in packages if (version := _version(name))},
    }


def _enqueue(program: Callable[..., Any], sets: Sequence[tuple], count: int) -> tuple[float, float]:
    """Seconds until all calls are enqueued, and until they are done."""
    start = time.perf_counter()
    for arguments in itertools.islice(itertools.cycle(sets), count):
        result = program(*arguments)  # results before the last are dropped
    enqueued = time.perf_counter() - start
    jax.block_until_ready(result)
    return enqueued, time.perf_counter() - start


def _busy_seconds(program: Callable[..., Any], sets: Sequence[tuple], count: int) -> float:
    """Time per call in which some kernel ran, from the profiler's record of GPU streams."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            _enqueue(program, sets, count)
        (file,) = glob.glob(f"{folder}/plugins/profile/*/*.xplane.pb")
        record = jax.profiler.ProfileData.from_file(file)
    spans = sorted(
        (event.start_ns, event.start_ns + event.duration_ns)
        for plane in record.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    )
    busy, until = 0.0, 0.0
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy * 1e-9 / count


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0] or None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
