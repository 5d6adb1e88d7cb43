"""Time and memory of reading and writing weights at the true size of Wan2.1 1.3B.

    python benchmarks/weights_true_size.py --folder=/tmp/weights

Writes a float32 file of random numbers in the original layout (5.7 GB), reads it into bfloat16 and
compares the time with `cat file > /dev/null`, exports it, reads the export and compares the two.
Takes 14 GB of disk, all of it deleted, and 6 GB of memory. Every reading runs in a separate
process; its peak memory is taken relative to that before the reading.
"""

import concurrent.futures
import datetime
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import safetensors
from absl import app, flags

from arl2_jax.config import ModelConfig
from arl2_jax.models import compute_shapes, param_shapes
from arl2_jax.weights import export_params, load_params, model_config

_FOLDER = flags.DEFINE_string("folder", None, "Folder for the files; is deleted.", required=True)
_OUT = flags.DEFINE_string("out", "benchmarks/results/weights_cpu.json", "File to write.")
_COLD = flags.DEFINE_bool("cold", False, "Also read from the disk itself; takes root, on Linux.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Repetitions of what is timed.")

_CFG = ModelConfig.wan1p3b()


def main(_):
    """Run all stages, one after another."""
    folder = Path(_FOLDER.value)
    first, second = folder / "first", folder / "second"
    _alone(write_random, first)
    readings = {"cached": compare(first, drop=False)}
    if _COLD.value:
        readings["from_disk"] = compare(first, drop=True)
    touch = [_alone(seconds_of_memory, _CFG) for _ in range(_REPEATS.value)]
    exported = _alone(export, first, second)
    again = _alone(read, second, "master", True)
    result = {
        "date": datetime.date.today().isoformat(),
        "what": "weights of Wan2.1 1.3B: random float32 numbers, one file in the original layout",
        "command": "python benchmarks/weights_true_size.py --folder=FOLDER --cold",
        "timed": "wall time; cat and the import into bfloat16 in turn, and the filling of as much "
        f"new memory as the result takes, {_REPEATS.value} times, each in a process of its own; "
        "the others once, with the file in the system's cache",
        "file_GB": sum(file.stat().st_size for file in first.iterdir()) / 1e9,
        "cat_and_import_into_bfloat16": readings,
        "new_memory_seconds": touch,
        "export_in_float32": exported,
        "import_of_the_export": again,
        "equal": exported.pop("digest") == again.pop("digest"),
        "device": {"platform": "cpu", "kind": platform.machine(), "cpu_count": os.cpu_count()},
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (jax, np, ml_dtypes, safetensors)},
    }
    shutil.rmtree(folder)
    Path(_OUT.value).write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def compare(folder: Path, drop: bool) -> dict:
    """`cat` and the import in turn; with `drop` the system's cache is emptied before each."""
    cat, imports = [], []
    for _ in range(_REPEATS.value):
        _drop_cache(drop)
        cat.append(seconds_of_cat(folder))
        _drop_cache(drop)
        imports.append(_alone(read, folder, "compute"))
    seconds = [result["seconds"] for result in imports]
    return {
        "cat_seconds": cat,
        "import_seconds": seconds,
        "median_ratio": float(np.median(seconds) / np.median(cat)),
        "imports": imports,
    }


def write_random(folder: Path) -> None:
    """Normal numbers in the shapes of the model."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.standard_normal(leaf.shape, np.float32)
    params = jax.tree.map(draw, param_shapes(_CFG))
    export_params(folder, params, _CFG, "wan", shard_size=float("inf"))


def seconds_of_cat(folder: Path) -> float:
    """Time of `cat file > /dev/null`."""
    file = next(folder.glob("*.safetensors"))
    start = time.perf_counter()
    subprocess.run(f"cat {file} > /dev/null", shell=True, check=True)
    return time.perf_counter() - start


def seconds_of_memory(cfg: ModelConfig) -> float:
    """Time of filling new memory of the size of the bfloat16 result, on all cores.

    On virtual machines the host may have to find this memory first, which says nothing about us.
    """
    leaves = jax.tree.leaves(compute_shapes(cfg))
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        filled = list(pool.map(lambda leaf: np.full(leaf.shape, 1, leaf.dtype), leaves))
    seconds = time.perf_counter() - start
    assert len(filled) == len(leaves)
    return seconds


def read(folder: Path, precision: str, digest: bool = False) -> dict:
    """Read the weights, and measure time and this process's memory."""
    cfg = model_config(folder, dtype="bfloat16")
    param_shapes(cfg)  # traced once in a process, for any weights
    peak = Peak()
    start, cpu = time.perf_counter(), time.process_time()
    params = load_params(folder, cfg, precision=precision)
    result = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - cpu,
        "kept_GB": sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9,
        "largest_tensor_GB": max(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9,
        "peak_anonymous_GB": peak.stop(),
        "peak_resident_GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    return result | ({"digest": digest_of(params)} if digest else {})


def export(source: Path, target: Path) -> dict:
    """Read weights as they are and write them again."""
    params = load_params(source, _CFG)
    peak, start = Peak(), time.perf_counter()
    export_params(target, params, _CFG, "wan", shard_size=float("inf"))
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_anonymous_above_the_tree_GB": peak.stop(),
        "digest": digest_of(params),
    }


def digest_of(params) -> str:
    """Of names, types and all values."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


class Peak:
    """The peak of anonymous memory (RssAnon) since its creation, relative to that time."""

    def __init__(self):
        self._start = self._peak = self._now()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> float:
        """The peak in GB."""
        self._stopped.set()
        self._thread.join()
        return (max(self._peak, self._now()) - self._start) * 1024 / 1e9

    def _watch(self) -> None:
        while not self._stopped.wait(0.01):
            self._peak = max(self._peak, self._now())

    def _now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def _drop_cache(drop: bool) -> None:
    if drop:
        subprocess.run("sync; echo 3 > /proc/sys/vm/drop_caches", shell=True, check=True)


def _alone(function, *args):
    """The result of a function in a new process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


if __name__ == "__main__":
    app.run(main)
