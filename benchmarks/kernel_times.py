"""Times the kernels of pallas_kernels: implementations x named shapes x dtypes x directions.

    python benchmarks/kernel_times.py --shapes=wan1p3b_block,wan1p3b_clip --output=times.json
    python benchmarks/kernel_times.py --shapes=tiny --implementations=xla      # on a CPU

Directions are forward, forward_backward (a value and all gradients) and backward (the gradients
alone, from residuals made before). device_time.py says how device time is taken, operations.py what
counts as operations and bytes. The roofline is the larger of operations over the rate of a large
matrix product (bfloat16, or float32 in full precision) and bytes over that of a large copy, both
measured in the same run; a share of it is that time over the measured one.

Every case's first results are compared with those of the XLA form in float32: the relative errors
are in the JSON, the largest in the table, next to the time and the range of its samples. The
implementation "default" is the library's own choice; "fla_chunk" and "fla_recurrent" are those of
flash-linear-attention, forward alone, their last state compared. A case that an implementation
cannot do, or in which it fails, is listed with the reason.
"""

import functools
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import device_time
import flash_linear_attention as fla
import jax
import jax.numpy as jnp
from absl import app, flags
from etils import epath
from jax import Array
from operations import OPERATIONS, Cost, Operation

_DIRECTIONS = ("forward", "forward_backward", "backward")
_IMPLEMENTATIONS = set[str]().union(*(o.implementations for o in OPERATIONS.values()))
_SHAPES = set[str]().union(*(o.shapes for o in OPERATIONS.values()))


def _choices(name: str, choices: Any, default: list[str], text: str) -> flags.FlagHolder:
    """Defines a flag that takes some of the choices."""
    text += f": of {', '.join(sorted(choices))}."
    flag = flags.DEFINE_list(name, default, text)
    flags.register_validator(flag, lambda found: set(found) <= set(choices), text)
    return flag


_OPERATION = _choices("operations", OPERATIONS, list(OPERATIONS), "What to time")
_IMPLEMENTATION = _choices(
    "implementations", _IMPLEMENTATIONS, sorted(_IMPLEMENTATIONS - {"reference"}), "By whom"
)
_SHAPE = _choices("shapes", _SHAPES, ["wan1p3b_block"], "Sizes")
_DTYPE = _choices("dtypes", ("bfloat16", "float32"), ["bfloat16"], "Dtypes of arguments")
_DIRECTION = _choices("directions", _DIRECTIONS, list(_DIRECTIONS), "Directions")
_PRECISION = flags.DEFINE_enum(
    "precision", "default", ["default", "high"], "Precision of gated_delta_states."
)
_REPEATS = flags.DEFINE_integer("repeats", 10, "Timed samples of each case.", lower_bound=1)
_PROFILE = flags.DEFINE_bool("profile", False, "Also ask the profiler; on GPUs.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write, anew after every case.")


class Bench:
    """An operation at one shape and dtype: its arguments, and what its results should be."""

    def __init__(self, operation: Operation, shape: Any, dtype: str):
        self.operation, self.shape, self.dtype = operation, shape, dtype
        forward, backward = operation.cost(shape, jnp.dtype(dtype).itemsize)
        costs = (forward, forward + backward, backward)
        self.costs: dict[str, Cost] = dict(zip(_DIRECTIONS, costs, strict=True))

    def time(self, implementation: str, direction: str) -> dict[str, Any]:
        """Figures of one case.

        Raises:
          NotImplementedError: the implementation cannot do it here.
        """
        count = device_time.sets_beyond_cache(self.costs[direction].size)
        sets = [self._arguments(seed) for seed in range(count)]
        if implementation in fla.FUNCTIONS:
            return self._time_fla(implementation, direction, [inputs for inputs, _ in sets])
        call = self._call(implementation, _PRECISION.value)
        if direction == "forward":
            sets = [inputs for inputs, _ in sets]
        elif direction == "backward":
            residuals = jax.jit(lambda *inputs: jax.vjp(call, *inputs)[1])
            sets = [(residuals(*inputs), cotangent) for inputs, cotangent in sets]
        function, names = self._function(call, direction)
        results, figures = device_time.measure(function, sets, _REPEATS.value, _PROFILE.value)
        results = zip(names, results, strict=True)
        return figures | {"relative_error": {name: self._error(name, x) for name, x in results}}

    def _time_fla(self, name: str, direction: str, sets: list[tuple]) -> dict[str, Any]:
        reason = fla.unsupported_reason() or (
            "is timed only forward" if direction != "forward" else None
        )
        if reason:
            raise NotImplementedError(f"implementation {name!r} {reason}")
        state, figures = fla.measure(name, sets, _REPEATS.value)
        expected = self.expected["states"][:, -1]
        return figures | {"relative_error": {"last_state": _relative_error(state, expected)}}

    def _arguments(self, seed: int) -> tuple[tuple[Array, ...], Array]:
        """Inputs, and a cotangent of the result."""
        key = jax.random.key(seed)
        inputs = self.operation.make_inputs(self.shape, self.dtype, key)
        key = jax.random.fold_in(key, 1)
        return inputs, jax.random.normal(key, self._result.shape, self._result.dtype)

    @functools.cached_property
    def _result(self) -> jax.ShapeDtypeStruct:
        make = functools.partial(self.operation.make_inputs, self.shape, self.dtype)
        return jax.eval_shape(lambda key: self._call("xla")(*make(key)), jax.random.key(0))

    def _call(self, implementation: str, precision: str = "default") -> Callable[..., Array]:
        name = None if implementation == "default" else implementation
        return self.operation.call(self.shape, name, precision)

    def _function(self, call: Callable[..., Array], direction: str):
        """What is timed, and the names of its results."""

        def forward(*inputs):
            return (call(*inputs),)

        def forward_backward(inputs, cotangent):
            value, vjp = jax.vjp(call, *inputs)
            return value, *vjp(cotangent)

        def backward(vjp, cotangent):
            return vjp(cotangent)

        names = self.operation.results
        return {
            "forward": (forward, names[:1]),
            "forward_backward": (forward_backward, names),
            "backward": (backward, names[1:]),
        }[direction]

    @functools.cached_property
    def expected(self) -> dict[str, Array]:
        """Results for the first set of arguments, by the XLA form in float32."""
        part = lambda x: self.operation.part(self.shape, x).astype("float32")
        arguments = jax.tree.map(part, self._arguments(0))
        function, names = self._function(self._call("xla", "high"), "forward_backward")
        return dict(zip(names, jax.jit(function)(*arguments), strict=True))

    def _error(self, name: str, x: Array) -> float:
        return _relative_error(self.operation.part(self.shape, x), self.expected[name])


def _relative_error(x: Array, expected: Array) -> float:
    x = x.astype(expected.dtype)
    return float(jnp.linalg.norm((x - expected).ravel()) / jnp.linalg.norm(expected.ravel()))


def run_case(bench: Bench, implementation: str, direction: str, peaks: dict[str, float]) -> dict:
    """Figures and rates of a case, or why there are none."""
    try:
        figures = bench.time(implementation, direction)
    except NotImplementedError as error:
        return {"obstacle": str(error)}
    except Exception as error:  # one that fails must not cost the figures of the others
        return {"obstacle": f"{type(error).__name__}: {error}".split("\n")[0]}
    cost, seconds = bench.costs[direction], figures["seconds"]["median"]
    floor = max(
        cost.flop / peaks[f"{bench.dtype}_flop_per_second"], cost.size / peaks["bytes_per_second"]
    )
    return figures | {
        "flop": cost.flop,
        "bytes": cost.size,
        "tflop_per_second": cost.flop / seconds / 1e12,
        "gb_per_second": cost.size / seconds / 1e9,
        "roofline_seconds": floor,
        "roofline_share": floor / seconds,
    }


def line_of(case: dict[str, Any]) -> str:
    """A line of the table."""
    names = ("operation", "shape", "dtype", "implementation", "direction")
    start = "{:21} {:23} {:8} {:13} {:16} ".format(*(case[name] for name in names))
    if "obstacle" in case:
        return start + case["obstacle"]
    seconds = case["seconds"]
    spread = (seconds["max"] - seconds["min"]) / seconds["median"]
    error = max(case["relative_error"].values())
    slow_host = ", host too slow" if case.get("host_share", 0) > 0.8 else ""
    return (
        f"{start}{seconds['median'] * 1e6:9.1f} us ({spread:4.0%})"
        f" {case['tflop_per_second']:7.1f} TFLOP/s {case['gb_per_second']:7.1f} GB/s"
        f" {case['roofline_share']:6.1%} of roofline, error {error:.1e}{slow_host}"
    )


def main(_):
    """Times every case, prints the table and writes the JSON."""
    peaks = device_time.measure_peaks()
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "what": "kernels of pallas_kernels on random inputs, device time per call in seconds",
        "timed": "samples of calls enqueued at once, in turn over several argument sets, and "
        "waited for once; compilation apart (benchmarks/device_time.py)",
        "precision": _PRECISION.value,
        **device_time.describe_device(),
        "peaks": peaks,
        "cases": [],
    }
    print(json.dumps(result, indent=2))
    for name, operation in ((name, OPERATIONS[name]) for name in _OPERATION.value):
        implementations = [i for i in _IMPLEMENTATION.value if i in operation.implementations]
        shapes = [shape for shape in _SHAPE.value if shape in operation.shapes]
        for shape, dtype in itertools.product(shapes, _DTYPE.value):
            bench = Bench(operation, operation.shapes[shape], dtype)
            for implementation, direction in itertools.product(implementations, _DIRECTION.value):
                case = {
                    "operation": name,
                    "shape": shape,
                    "dtype": dtype,
                    "implementation": implementation,
                    "direction": direction,
                } | run_case(bench, implementation, direction, peaks)
                result["cases"].append(case)
                print(line_of(case), flush=True)
                if _OUTPUT.value:
                    epath.Path(_OUTPUT.value).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    app.run(main)
