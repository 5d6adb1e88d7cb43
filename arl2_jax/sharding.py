"""Device mesh, shardings of parameters by their path, and shardings of activations."""

import collections
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from arl2_jax.config import MeshConfig
from arl2_jax.errors import ConfigError
from arl2_jax.parameters import facts_of

AXES = ("data", "fsdp", "tensor", "context")
# Mesh axes of a batch's clips, of a clip's frame blocks, and of heads.
CLIPS, BLOCKS, HEADS = ("data", "fsdp"), "context", "tensor"
BATCH = PartitionSpec(CLIPS)


def make_mesh(config: MeshConfig, devices=None) -> Mesh:
    """Make a mesh over all devices with the axes data, fsdp, tensor and context.

    Raises:
      ConfigError: the axes do not multiply to the number of devices, or clips span processes.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor, config.context]
    known = math.prod(n for n in sizes if n > 0)
    sizes = [len(devices) // known if n == -1 else n for n in sizes]
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"does not multiply to the {len(devices)} devices here",
            field="train.mesh",
            value=config,
            remedy="change an axis or set one to -1",
        )
    auto = (AxisType.Auto,) * len(AXES)
    mesh = jax.make_mesh(tuple(sizes), AXES, axis_types=auto, devices=devices)
    # Each process reads its own clips.
    if any(len({d.process_index for d in same.flat}) > 1 for row in mesh.devices for same in row):
        raise ConfigError(
            "puts a clip on devices of several processes",
            field="train.mesh",
            value=config,
            remedy="make tensor times context divide the devices of one process",
        )
    return mesh


def check_blocks(mesh: Mesh, blocks: int, *, frames: str = "data.frames") -> None:
    """Check that every device gets whole frame blocks of a clip.

    Args:
      mesh: devices.
      blocks: number of frame blocks in a clip.
      frames: the field that sets how many frames a clip has.

    Raises:
      ConfigError: the blocks cannot be sharded evenly.
    """
    if blocks % mesh.shape["context"]:
        raise ConfigError(
            f"must divide the {blocks} frame blocks of a clip, {frames} / model.frames_per_block",
            field="train.mesh.context",
            value=mesh.shape["context"],
            remedy="change one of them",
        )


def check_batch(mesh: Mesh, batch_size: int, accumulation: int, phase: str) -> None:
    """Check that every device gets whole clips of every micro-batch.

    Raises:
      ConfigError: the clips cannot be sharded evenly.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (parts * accumulation):
        raise ConfigError(
            f"must be a multiple of {phase}.accumulation={accumulation} times the {parts} "
            "devices along data and fsdp",
            field=f"{phase}.batch_size",
            value=batch_size,
            remedy="change one of them",
        )


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return the partition spec of one parameter; axes that do not divide a dimension are omitted.

    Raises:
      ConfigError: nothing is declared about the parameter.
    """
    axes = facts_of(path).axes
    leading = (None,) * (len(shape) - len(axes))
    fits = lambda axis, size: axis is not None and size % mesh.shape[axis] == 0
    return PartitionSpec(
        *(a if fits(a, n) else None for a, n in zip(leading + axes, shape, strict=True))
    )


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Return the NamedSharding of each array of a tree; scalars, keys, counters are replicated."""

    def sharding(path, leaf):
        if leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, param_spec(_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def jit_on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function from arrays to a parameter tree with a result that is sharded over a mesh.

    No device ever holds more than its part of the result.
    """

    def call(*args):
        shardings = tree_shardings(jax.eval_shape(function, *args), mesh)
        return jax.jit(function, out_shardings=shardings)(*args)

    return call


def sharding_table(tree: Any, mesh: Mesh) -> str:
    """Format one line per kind of parameter: path, shape, sharding, and megabytes per device."""
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
    """Put a tree of host or device arrays on devices with these shardings."""
    return jax.tree.map(jax.device_put, tree, shardings)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global arrays from a process's part of a batch, sharded by clips and latent frames."""
    make = jax.make_array_from_process_local_data
    return {name: make(_batch_sharding(name, mesh), x) for name, x in batch.items()}


def abstract_batch(
    shapes: Mapping[str, tuple[int, ...]], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return abstract results of `put_batch` for float32 arrays with these global shapes."""
    return {
        name: jax.ShapeDtypeStruct(shape, np.float32, sharding=_batch_sharding(name, mesh))
        for name, shape in shapes.items()
    }


def _batch_sharding(name: str, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(CLIPS, BLOCKS) if name == "latents" else BATCH)


def per_device(
    function: Callable[..., Any],
    inputs: tuple[PartitionSpec, ...],
    output: PartitionSpec | tuple[PartitionSpec, ...],
) -> Callable[..., Any]:
    """Wrap a function in `jax.shard_map` over the current mesh; without a mesh, leave it as it is.

    For kernels, which XLA cannot partition. The mesh is the ambient one of `jax.set_mesh`, so that
    layers need not pass it on.

    Args:
      function: from arrays to one array or a tuple of arrays.
      inputs, output: mesh axes of their dimensions. If axes do not divide a dimension, the last of
        them are omitted everywhere: their devices repeat the same work.
    """

    def call(*arrays):
        mesh = current_mesh()
        if mesh is None:
            return function(*arrays)
        sizes = collections.defaultdict(set)
        for array, spec in zip(arrays, inputs, strict=True):
            for axes, size in zip(spec, array.shape, strict=False):
                sizes[axes].add(size)
        fit = lambda spec: PartitionSpec(*(_dividing(axes, sizes[axes], mesh) for axes in spec))
        outputs = tuple(map(fit, output)) if type(output) is tuple else fit(output)
        # Kernels do not say along which axes their results vary, so it cannot be checked.
        return jax.shard_map(
            function, in_specs=tuple(map(fit, inputs)), out_specs=outputs, check_vma=False
        )(*arrays)

    return call


def constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    """Constrain the sharding of x on the current mesh; axes that do not divide it are omitted."""
    mesh = current_mesh()
    if mesh is None:
        return x
    axes = (_dividing(axes, {size}, mesh) for axes, size in zip(spec, x.shape, strict=False))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def current_mesh() -> AbstractMesh | None:
    """Return the mesh of `jax.set_mesh` if it is from `make_mesh` and has several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}
    return mesh if ours and mesh.size > 1 else None


def _dividing(axes: str | tuple[str, ...] | None, sizes: set[int], mesh) -> tuple[str, ...]:
    """Return the longest prefix of the axes whose product divides all sizes."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    for count in range(len(names), 0, -1):
        parts = math.prod(mesh.shape[name] for name in names[:count])
        if all(size % parts == 0 for size in sizes):
            return names[:count]
    return ()


def _name(path) -> str:
    parts = (getattr(entry, "key", getattr(entry, "name", None)) for entry in path)
    return "/".join(str(part) for part in parts if part is not None)
