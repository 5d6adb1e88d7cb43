"""Writing of safetensors files tensor by tensor, with only a block of rows in memory."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arl2_jax.weights.axes import AxisMap

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
# Names of types in the format.
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_ROWS = 256


class ExportTensor(NamedTuple):
    """A parameter to be written: name in the file, our array, and the map of its axes."""

    name: str
    array: Any
    axes: AxisMap

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.array.size * np.dtype(self.array.dtype).itemsize


def to_file_array(tensor: ExportTensor) -> np.ndarray:
    """Convert a parameter to the file's tensor."""
    moved = np.ascontiguousarray(tensor.axes.to_file_axes(np.asarray(tensor.array)))
    return moved.reshape(tensor.axes.file_shape)


def write_shards(folder: Path, tensors: Sequence[ExportTensor], shard_size: float) -> None:
    """Write one file, or shards and their index if it would be larger than `shard_size` bytes."""
    shards: list[list[ExportTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.size > shard_size:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.size
    if len(shards) == 1:
        return write_file(folder / SINGLE, tensors)
    stem = SINGLE.removesuffix(".safetensors")
    names = [f"{stem}-{k:05}-of-{len(shards):05}.safetensors" for k in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_file(folder / name, shard)
    index = {
        "metadata": {"total_size": sum(tensor.size for tensor in tensors)},
        "weight_map": {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        },
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def write_file(file: Path, tensors: Iterable[ExportTensor]) -> None:
    """Write one file: the length of the header, the header, then the tensors in order.

    Source: the format's description in the documentation of the safetensors library.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.size
        header[tensor.name] = {
            "dtype": _CODES[np.dtype(tensor.array.dtype).name],
            "shape": tensor.axes.file_shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for block in _blocks(tensor):
                opened.write(block.data)


def _blocks(tensor: ExportTensor) -> Iterable[np.ndarray]:
    array = np.asarray(tensor.array)
    # Integers of the same size are faster to copy than bfloat16.
    bits = array.view(f"u{array.dtype.itemsize}")
    rows = tensor.axes.to_file_axes(bits)
    if rows.ndim < 2:
        yield np.ascontiguousarray(rows)
        return
    for start in range(0, len(rows), _ROWS):
        yield np.ascontiguousarray(rows[start : start + _ROWS])
