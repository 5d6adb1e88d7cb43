"""flash-linear-attention's gated delta rule, for comparison with ours where it is installed.

Its functions compute an output for every token, which is unused here, and return only the last
state. Their dozen launches from Python take longer than the kernels, so the device time is that of
a CUDA graph with one call on each of several argument sets.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_time import summary

FUNCTIONS = {
    "fla_chunk": "chunk_gated_delta_rule",
    "fla_recurrent": "fused_recurrent_gated_delta_rule",
}
_GRAPH_LAUNCHES = 20


def unsupported_reason() -> str | None:
    """Return why it cannot run here, or None."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "fla")):
        return "needs PyTorch and flash-linear-attention; they are not installed"
    if jax.default_backend() != "gpu":
        return f"needs a GPU; the device is {jax.devices()[0].device_kind}"
    return None


def measure(name: str, sets: Sequence[tuple], repeats: int) -> tuple[jax.Array, dict[str, Any]]:
    """Times a function of `FUNCTIONS` in its forward direction; also returns its last state.

    Args:
      name: a key of `FUNCTIONS`.
      sets: tuples k, v, g, beta, initial_state of JAX arrays on the GPU.
      repeats: timed samples.
    """
    import torch
    from fla.ops import gated_delta_rule

    function = getattr(gated_delta_rule, FUNCTIONS[name])
    jax.block_until_ready(sets)
    tensors = [[torch.from_dlpack(x) for x in arguments] for arguments in sets]
    queries = [torch.randn_like(k) for k, *_ in tensors]

    def call(q, k, v, g, beta, state):
        return function(q, k, v, g, beta, initial_state=state, output_final_state=True)[1]

    def launch():
        return [call(q, *x) for q, x in zip(queries, tensors, strict=True)]

    with torch.no_grad():
        for _ in range(3):  # compiles and tunes
            states = launch()
        torch.cuda.synchronize()
        from_python = _samples(torch, launch, 1, repeats) / len(sets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = launch()
        seconds = _samples(torch, graph.replay, _GRAPH_LAUNCHES, repeats) / len(sets)
    del captured
    figures = {
        "seconds": summary(seconds),
        "samples": repeats,
        "calls_a_sample": _GRAPH_LAUNCHES * len(sets),
        "argument_sets": len(sets),
        "seconds_launched_from_python": float(np.median(from_python)),
    }
    return jnp.asarray(states[0].float().cpu().numpy()), figures


def _samples(torch: Any, launch, count: int, repeats: int) -> np.ndarray:
    """Seconds per launch between two CUDA events, for each sample; one before them warms up."""
    seconds = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            launch()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3 / count)
    return np.array(seconds[1:])
