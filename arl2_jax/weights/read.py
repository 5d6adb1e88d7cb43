"""Strict reading of a layout's tensors into our tree, with little memory and slices per device."""

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from flax import traverse_util
from jax.sharding import Sharding

from arl2_jax.errors import WeightsError
from arl2_jax.weights.axes import AxisMap, Index, fit_axes
from arl2_jax.weights.layout import Layout, detect_layout
from arl2_jax.weights.safetensors_file import ExportTensor, to_file_array
from arl2_jax.weights.tensors import FileTensor

# Rows that are cast and transposed together, few enough for the processor's cache.
_ROWS = 256
_CACHE_LINE = 64
_FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
# Bits of the exponent, all set in NaN and infinity alone.
_EXPONENTS = {
    np.dtype(np.float32): (np.uint32, 0x7F800000),
    np.dtype(ml_dtypes.bfloat16): (np.uint16, 0x7F80),
}


class Source(NamedTuple):
    """The source of a parameter: name of the tensor, the tensor, and the map of its axes."""

    name: str
    tensor: FileTensor
    axes: AxisMap


def read_tree(
    tensors: Mapping[str, FileTensor],
    layouts: Sequence[Layout],
    targets: Mapping[str, Any],
    *,
    where: object,
    shardings: Mapping[str, Sharding] | None = None,
) -> dict[str, Any]:
    """Read tensors into parameters: each tensor is used once, each parameter filled once.

    Besides the result, host memory holds a block of rows per thread (a whole tensor if axes are
    merged or split); with shardings, one parameter's slices.

    Args:
      tensors: from `open_tensors`.
      layouts: the layouts that they may be in.
      targets: shape and dtype of every parameter, by path ("blocks/0/ffn/fc1/kernel").
      where: the file or folder, for messages.
      shardings: by path; each device then gets its slice, and only slices are read.

    Returns:
      By path, numpy arrays; or jax arrays if shardings are given.

    Raises:
      WeightsError: names or shapes do not match (all of them in one message); a tensor is not of
        floating point, holds NaN or infinity, or cannot be read.
    """
    layout = detect_layout(tensors, layouts, where)
    sources = match(tensors, layout, targets, where=where)

    def read(path: str, index: Index, run: Callable = map) -> np.ndarray:
        return _read_slice(sources[path], index, np.dtype(targets[path].dtype), where, run)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        if shardings is None:
            whole = lambda path: read(path, tuple(slice(0, size) for size in targets[path].shape))
            return dict(zip(targets, pool.map(whole, targets), strict=True))
        # One after another, each by all threads: at most one parameter is in host memory.
        read_blocks = functools.partial(read, run=pool.map)
        return {
            path: _sharded(functools.partial(read_blocks, path), targets[path], shardings[path])
            for path in targets
        }


def match(
    tensors: Mapping[str, FileTensor],
    layout: Layout,
    targets: Mapping[str, Any],
    *,
    where: object,
) -> dict[str, Source]:
    """Find the tensor of every parameter, by names and shapes alone.

    Args, Raises: as in `read_tree`.

    Returns:
      Sources by path, one for each target.
    """
    sources: dict[str, Source] = {}
    unexpected, misshaped, used = [], [], set()
    for name, tensor in tensors.items():
        first = layout.aliases.get(name, name)
        if first != name and first in tensors and tensors[first].shape == tensor.shape:
            continue
        path, pattern = layout.to_path(name) or ("", "")
        if path not in targets or path in used:
            unexpected.append(name)
            continue
        used.add(path)
        wanted = tuple(targets[path].shape)
        axes = fit_axes(pattern, tensor.shape, wanted, layout.sizes)
        if axes is None:
            misshaped.append(f"{name} {list(tensor.shape)} (for {path} {list(wanted)})")
        elif tensor.dtype not in _FLOATS:
            raise WeightsError(
                f"{where}: {name} is of type {tensor.dtype}; parameters are bfloat16, float16, "
                "float32 or float64",
                remedy="name weights that are not quantised",
            )
        else:
            sources[path] = Source(name, tensor, axes)
    missing = [path for path in targets if path not in used]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    problems = [f"{len(n)} {kind}: {', '.join(sorted(n))}" for kind, n in kinds.items() if n]
    if problems:
        raise WeightsError(
            f"{where} does not hold the weights of this model ({layout.name} layout); "
            f"{'; '.join(problems)}",
            remedy="name other weights, or change the model's settings",
        )
    return sources


def tree_tensors(params: Mapping[str, Any], layout: Layout) -> dict[str, np.ndarray]:
    """Convert parameters to the tensors of a layout; the inverse of `read_tree`.

    Args:
      params: nested dict of arrays.
      layout: the layout.

    Returns:
      Arrays by name in a file, in their own dtypes.

    Raises:
      WeightsError: the layout has no place for some parameters.
    """
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    return {tensor.name: to_file_array(tensor) for tensor in export_tensors(flat, layout)}


def export_tensors(flat: Mapping[str, Any], layout: Layout) -> list[ExportTensor]:
    """Return every parameter as a tensor of a file, in the tree's order; see `tree_tensors`."""
    places = {path: layout.to_source(path) for path in flat}
    unknown = [path for path, place in places.items() if place is None]
    if unknown:
        raise WeightsError(
            f"the {layout.name} layout has no place for {len(unknown)} parameters: "
            f"{', '.join(unknown[:8])}",
            remedy="choose another layout",
        )
    result = []
    for path, leaf in flat.items():
        name, pattern = places[path] or ("", "")
        axes = fit_axes(pattern, None, leaf.shape, layout.sizes)
        if axes is None:
            raise WeightsError(
                f"{path} {list(leaf.shape)} does not fit the {layout.name} layout ({pattern})"
            )
        result.append(ExportTensor(name, leaf, axes))
    return result


def _read_slice(
    source: Source, index: Index, dtype: np.dtype, where: object, run: Callable
) -> np.ndarray:
    """Read a slice of a parameter block by block; `run` maps a function over the blocks."""
    axes, within, rest = source.axes.slices(index)
    out = np.empty(axes.shape, dtype)
    target = axes.to_file_axes(out)
    if not axes.by_rows:
        _fill(target, source, within, where)
        return out[rest]
    first, *others = within

    def fill(start: int) -> None:
        stop = min(start + _ROWS, first.stop)
        place = target[start - first.start : stop - first.start]
        _fill(place, source, (slice(start, stop), *others), where)

    # A list, so that an error in any block is raised here.
    list(run(fill, range(first.start, first.stop, _ROWS)))
    return out[rest]


def _fill(place: np.ndarray, source: Source, index: Index, where: object) -> None:
    """Read, check and cast one block."""
    try:
        block = _cast(source.tensor.read(index), place)
    except Exception as error:
        raise WeightsError(
            f"{where}: {source.name} cannot be read: {error}", remedy="download it again"
        ) from None
    if place.dtype in _EXPONENTS:  # integers are faster to compare and to copy
        unsigned, exponent = _EXPONENTS[place.dtype]
        block, place = block.view(unsigned), place.view(unsigned)
        finite = (block & unsigned(exponent)).max(initial=0) < exponent
    else:
        finite = np.isfinite(block).all()
    if not finite:
        raise WeightsError(
            f"{where}: {source.name} holds NaN or infinity; the file is damaged or its "
            "training diverged",
            remedy="name other weights",
        )
    place[...] = block


def _cast(block: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Cast the block to the shape and type of its place."""
    block = block.reshape(place.shape)
    if place.ndim != 2 or place.flags.c_contiguous:
        return block.astype(place.dtype, copy=False)
    # To be transposed: rows are padded by one cache line, so that the values of a column do not
    # share a few sets of the cache. This is two to four times as fast.
    rows, columns = block.shape
    spare = np.empty((rows, columns + _CACHE_LINE // place.itemsize), place.dtype)
    spare[:, :columns] = block
    return spare[:, :columns]


def _sharded(read: Callable[[Index], np.ndarray], target: Any, sharding: Sharding) -> jax.Array:
    """Put one parameter on its devices; a slice for several devices is read once."""
    slices: dict[tuple, np.ndarray] = {}

    def slice_at(index: Index | None) -> np.ndarray:
        pairs = zip(index or (), target.shape, strict=True)
        bounds = tuple(part.indices(size)[:2] for part, size in pairs)
        if bounds not in slices:
            slices[bounds] = read(tuple(slice(*pair) for pair in bounds))
        return slices[bounds]

    return jax.make_array_from_callback(tuple(target.shape), sharding, slice_at)
