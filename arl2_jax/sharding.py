"""Device mesh, layouts of parameters on it by their path, and layouts of activations."""

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
    """A mesh over all devices with the axes data, fsdp, tensor and context.

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
    # Every process reads clips of its own.
    if any(len({d.process_index for d in same.flat}) > 1 for row in mesh.devices for same in row):
        raise ConfigError(
            "puts a clip on devices of several processes",
            field="train.mesh",
            value=config,
            remedy="make tensor times context divide the devices of one process",
        )
    return mesh


def check_blocks(mesh: Mesh, blocks: int, *, frames: str = "data.frames") -> None:
    """Every device must get whole frame blocks of a clip.

    Args:
      mesh: devices.
      blocks: of a clip.
      frames: the field that sets how many frames a clip has.

    Raises:
      ConfigError: they cannot be shared out evenly.
    """
    if blocks % mesh.shape["context"]:
        raise ConfigError(
            f"must divide the {blocks} frame blocks of a clip, {frames} / model.frames_per_block",
            field="train.mesh.context",
            value=mesh.shape["context"],
            remedy="change one of them",
        )


def check_batch(mesh: Mesh, batch_size: int, accumulation: int, phase: str) -> None:
    """Every device must get whole clips of every micro-batch.

    Raises:
      ConfigError: they cannot be shared out evenly.
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
    """Layout of one parameter; an axis that does not divide a dimension is left out.

    Raises:
      ConfigError: nothing is declared of the parameter.
    """
    axes = facts_of(path).axes
    leading = (None,) * (len(shape) - len(axes))
    fits = lambda axis, size: axis is not None and size % mesh.shape[axis] == 0
    return PartitionSpec(
        *(a if fits(a, n) else None for a, n in zip(leading + axes, shape, strict=True))
    )


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedSharding of every array of a tree; scalars, keys and counters are on all devices."""

    def sharding(path, leaf):
        if leaf.ndim == 0:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, param_spec(_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def jit_on(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function of arrays to a parameter tree, compiled to lay its result out on a mesh.

    No device ever holds more than its part of the result.
    """

    def call(*args):
        layout = tree_shardings(jax.eval_shape(function, *args), mesh)
        return jax.jit(function, out_shardings=layout)(*args)

    return call


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
    """A process's share of a batch as part of global arrays: clips, and the frames of latents."""
    make = jax.make_array_from_process_local_data
    return {name: make(_batch_sharding(name, mesh), x) for name, x in batch.items()}


def abstract_batch(
    shapes: Mapping[str, tuple[int, ...]], mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `put_batch` makes of float32 arrays whose shapes over all processes are these."""
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
    """The function on each device's part of its arrays; on whole arrays where no mesh is in use.

    For kernels, which XLA cannot partition. The mesh in use is the one of `jax.set_mesh`, where JAX
    itself looks for it: on what a computation runs is no property of a model, and no affair of the
    layers between a trainer and a kernel.

    Args:
      function: of arrays, to one array or a tuple of arrays.
      inputs, output: mesh axes of their dimensions. Of axes that do not divide a dimension, the
        last are left out wherever they stand: their devices do the same work.
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
    """x, laid out over the mesh in use as `per_device` would have it."""
    mesh = current_mesh()
    if mesh is None:
        return x
    axes = (_dividing(axes, {size}, mesh) for axes, size in zip(spec, x.shape, strict=False))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def current_mesh() -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` has set, if it is one of `make_mesh` with several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = mesh.axis_names == AXES and set(mesh.axis_types) == {AxisType.Auto}
    return mesh if ours and mesh.size > 1 else None


def _dividing(axes: str | tuple[str, ...] | None, sizes: set[int], mesh) -> tuple[str, ...]:
    """As many of the axes, from the first on, as divide all of the sizes."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    for count in range(len(names), 0, -1):
        parts = math.prod(mesh.shape[name] for name in names[:count])
        if all(size % parts == 0 for size in sizes):
            return names[:count]
    return ()


def _name(path) -> str:
    parts = (getattr(entry, "key", getattr(entry, "name", None)) for entry in path)
    return "/".join(str(part) for part in parts if part is not None)
