"""Device mesh, and rules that lay out parameters on it by their path."""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from arl2_jax.config import ConfigError, MeshConfig

# Path -> axes of the last dimensions. "fsdp" shares a parameter out for storage, "tensor" for
# computation: heads and FFN columns. Optimizer states and averages have their parameter's path at
# their end, and so its layout.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(self_attn|cross_attn)/(q|k|v)/kernel$", ("fsdp", "tensor")),
    (r"(self_attn|cross_attn)/o/kernel$", ("tensor", "fsdp")),
    (r"(ffn|text_embedding|time_embedding)/fc1/kernel$", ("fsdp", "tensor")),
    (r"(ffn|text_embedding|time_embedding)/fc2/kernel$", ("tensor", "fsdp")),
    (r"(patch_embedding|time_projection|head/linear)/kernel$", ("fsdp", None)),
    (r"delta/phi_[qkv]$", ("tensor", None, None)),
    (r"delta/(a|b|gate)_proj/kernel$", ("fsdp", None)),
    (r"delta/lora_\w+/a$", ("fsdp", None)),
    (r"delta/lora_\w+/b$", (None, "fsdp")),
    (r"delta/(A_log|dt_bias)$", (None,)),
    (r"(bias|scale)$", (None,)),
    (r"modulation$", (None, None)),
    (r"muon/\w+/ns_coeffs$", (None,)),
)

BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """A mesh over all devices with the axes data, fsdp and tensor.

    Raises:
      ConfigError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = math.prod(n for n in sizes if n > 0)
    sizes = [len(devices) // known if n == -1 else n for n in sizes]
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"train.mesh={config} does not multiply to the {len(devices)} devices here; change an "
            "axis or set one to -1"
        )
    auto = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes), ("data", "fsdp", "tensor"), axis_types=auto, devices=devices)


def check_batch(mesh: Mesh, batch_size: int, accumulation: int, phase: str) -> None:
    """Every device must get whole clips of every micro-batch.

    Raises:
      ConfigError: they cannot be shared out evenly.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (parts * accumulation):
        raise ConfigError(
            f"{phase}.batch_size={batch_size} must be a multiple of {phase}.accumulation="
            f"{accumulation} times the {parts} devices along data and fsdp; change one of them"
        )


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Layout of one parameter; an axis that does not divide a dimension is left out.

    Raises:
      ConfigError: no rule matches the path.
    """
    for pattern, axes in RULES:
        if re.search(pattern, path):
            leading = (None,) * (len(shape) - len(axes))
            fits = lambda axis, size: axis is not None and size % mesh.shape[axis] == 0
            return PartitionSpec(
                *(a if fits(a, n) else None for a, n in zip(leading + axes, shape, strict=True))
            )
    raise ConfigError(f"no sharding rule matches the parameter {path}; add one to sharding.RULES")


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedSharding of every array of a tree; scalars, keys and counters are on all devices."""

    def sharding(path, leaf):
        if leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, param_spec(_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def sharding_table(tree: Any, mesh: Mesh) -> str:
    """One line per kind of parameter: its path, shape, layout, and megabytes on one device."""
    rows: dict[tuple, list] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = re.sub(r"(^|/)\d+/", r"\1*/", _name(path))
        spec = param_spec(_name(path), leaf.shape, mesh) if leaf.ndim else PartitionSpec()
        parts = math.prod(mesh.shape[axis] for axis in spec if axis)
        row = rows.setdefault((name, leaf.shape, str(tuple(spec))), [0, 0.0])
        row[0] += 1
        row[1] += math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize / parts / 1e6
    lines = [f"{'parameter':44} {'shape':>18} {'count':>5} {'MB/device':>10}  layout"]
    for (name, shape, spec), (count, size) in rows.items():
        lines.append(f"{name:44} {'x'.join(map(str, shape)):>18} {count:5} {size:10.2f}  {spec}")
    return "\n".join(lines)


def put(tree: Any, shardings: Any) -> Any:
    """Lays out a tree of host or device arrays."""
    return jax.tree.map(jax.device_put, tree, shardings)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A process's share of a batch as part of one global array."""
    sharding = NamedSharding(mesh, BATCH)
    make = jax.make_array_from_process_local_data
    return {name: make(sharding, values) for name, values in batch.items()}


def _name(path) -> str:
    parts = (getattr(entry, "key", getattr(entry, "name", None)) for entry in path)
    return "/".join(str(part) for part in parts if part is not None)
