"""Lazy access to tensors in files: safetensors, and PyTorch's .pt and .pth."""

import dataclasses
import hashlib
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open

from arl2_jax.errors import WeightsError
from arl2_jax.storage import absolute, is_remote, reason
from arl2_jax.weights.axes import Index

INDEX_SUFFIX = ".safetensors.index.json"
_SINGLE = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_PT = (".pt", ".pth")
_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "U16": np.uint16, "U32": np.uint32, "U64": np.uint64,
}  # fmt: skip
# Name parts of trainers' module wrappers, which are dropped.
_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module"}
# Keys of a .pt that may contain its tensors, the preferred first.
_ENTRIES = ("generator_ema", "generator", "ema", "model", "state_dict")
_SAMPLE = 1 << 16


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor in a file.

    Attributes:
      shape: its shape.
      dtype: its type, as numpy and ml_dtypes name it.
      read_slice: reads one slice, given with bounds for each axis.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read_slice: Callable[[Index], np.ndarray]

    @property
    def size(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, index: Index = ()) -> np.ndarray:
        """Read one slice; axes past the index are whole."""
        return self.read_slice((*index, *(slice(0, size) for size in self.shape[len(index) :])))


def open_tensors(path: epath.PathLike, entry: str | None = None) -> dict[str, FileTensor]:
    """Open the tensors of a file or folder without reading them.

    Args:
      path: a .safetensors, .pt or .pth file, the index of shards, or a folder that contains one of
        these. A .pt is read without running any code in it.
      entry: key of a .pt's tensors, e.g. "generator"; by default "generator_ema", else another that
        it has.

    Returns:
      Tensors by name, without the prefixes of wrappers ("model.", "_fsdp_wrapped_module.", ...).

    Raises:
      WeightsError: one line: a file is missing, damaged or of an unknown kind, a tensor occurs
        twice, or torch is needed and missing.
    """
    tensors: dict[str, FileTensor] = {}
    files = weight_files(path)
    for file in files:
        if file.suffix in _PT:
            found = _open_pt(file, entry)
        elif entry is not None:
            raise WeightsError(
                f"names a model of a .pt, which {file} is not",
                field="entry",
                value=entry,
                remedy="omit it",
            )
        else:
            found = _open_safetensors(file)
        for name, tensor in found:
            name = _unwrapped(name)
            if name in tensors:
                raise WeightsError(
                    f"{file.parent} does not hold one model; 1 unexpected: {name} is there twice",
                    remedy="name other weights",
                )
            tensors[name] = tensor
    return tensors


def weight_files(path: epath.PathLike) -> list[Path]:
    """Return the files of the weights at a path; see `open_tensors`.

    Raises:
      WeightsError: one line naming the first file that is missing.
    """
    source = absolute(path)
    if is_remote(source):
        raise WeightsError(
            f"{source} is remote", remedy="copy the files of weights to a local folder"
        )
    file = Path(source)
    if not file.exists():
        raise WeightsError(f"{file} does not exist", remedy="name another file or folder")
    if file.is_dir():
        file = _main_file(file)
    if file.name.endswith(INDEX_SUFFIX):
        return _shards(file)
    if file.suffix not in (".safetensors", *_PT):
        raise WeightsError(
            f"{file} is not a .safetensors, .pt or .pth file",
            remedy="name one, or a folder of them",
        )
    return [file]


def fingerprint(path: epath.PathLike) -> str:
    """Return a fingerprint of a file's contents, in milliseconds.

    Args:
      path: any file, or a folder of weights. Its location and name have no influence.

    Returns:
      64 hex digits, a hash of sizes, beginnings (which name and shape all tensors), ends, and
      samples between. Files that differ only in a few bytes may have the same fingerprint.
    """
    source = Path(path).expanduser()
    if (source / "params").is_dir():
        files = [file for file in (source / "params").rglob("*") if file.is_file()]
    else:
        files = weight_files(source) if source.is_dir() else [source]
    try:
        digests = sorted(_digest(file) for file in files)
    except OSError as error:
        raise WeightsError(
            f"{source} cannot be read: {reason(error)}", remedy="name another"
        ) from None
    return hashlib.sha256(b"".join(digests)).hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON file that comes with weights; raise WeightsError if it is damaged."""
    try:
        return json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise WeightsError(f"{file} cannot be read: {error}", remedy="download it again") from None


def _main_file(folder: Path) -> Path:
    """Return the one file of a folder's weights, or their index."""
    for pattern in (f"*{INDEX_SUFFIX}", *_SINGLE, "*.safetensors", "*.pt", "*.pth"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise WeightsError(
                f"{folder} holds {len(found)} files that may be meant: "
                f"{', '.join(file.name for file in found[:5])}",
                remedy=f"name one of them, or download the index (*{INDEX_SUFFIX}) if they are "
                "shards",
            )
        if found:
            return found[0]
    raise WeightsError(
        f"no weights in {folder}: looked for *{INDEX_SUFFIX}, {_SINGLE[0]}, other "
        ".safetensors, .pt, .pth and params/ there",
        remedy="name another folder",
    )


def _shards(index: Path) -> list[Path]:
    names = set(read_json(index).get("weight_map", {}).values())
    if not names:
        raise WeightsError(f"{index} lists no files", remedy="download it again")
    files = [index.parent / name for name in sorted(names)]
    for file in files:
        if not file.exists():
            raise WeightsError(
                f"{file} is missing: {index} lists it among {len(files)} files",
                remedy="download it",
            )
    return files


def _open_safetensors(file: Path) -> Iterator[tuple[str, FileTensor]]:
    try:
        with safe_open(file, framework="numpy"):  # checks the header against the file's size
            pass
        content = np.memmap(file, np.uint8, "r")
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file} cannot be read: {reason(error)}", remedy="download it again"
        ) from None
    begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8:begin].tobytes())
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise WeightsError(
                f"{file}: {name} is of type {entry['dtype']}, which numpy does not have",
                remedy="name weights of bfloat16, float16 or float32",
            )
        start, stop = (begin + offset for offset in entry["data_offsets"])
        mapped = content[start:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
        yield name, _in_file(file, start, mapped.view(np.ndarray))


def _in_file(file: Path, start: int, mapped: np.ndarray) -> FileTensor:
    """Return a tensor whose bytes begin at `start`, and whose memory is mapped."""
    row_size = math.prod(mapped.shape[1:])

    def read_slice(index: Index) -> np.ndarray:
        block = np.asarray(mapped[index])  # of a scalar, too
        if block.shape[1:] != mapped.shape[1:] or not block.ndim:
            return block
        # Whole rows are read: twice as fast as page faults, and no pages stay in memory.
        first = start + index[0].start * row_size * mapped.itemsize
        return np.fromfile(file, mapped.dtype, block.size, offset=first).reshape(block.shape)

    return FileTensor(mapped.shape, mapped.dtype, read_slice)


def _open_pt(file: Path, entry: str | None) -> Iterator[tuple[str, FileTensor]]:
    try:
        import torch  # pyright: ignore[reportMissingImports] - an extra
    except ImportError:
        raise WeightsError(
            f"{file} is a file of PyTorch, which takes torch to read",
            remedy="pip install 'arl2-jax[pt]' (here: pip install -e '.[pt]'), or name "
            "safetensors files",
        ) from None
    try:
        with file.open("rb") as opened:
            zipped = opened.read(2) == b"PK"  # the older form cannot be mapped
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if "Weights only" not in str(error):
            raise WeightsError(
                f"{file} cannot be read: {reason(error)}", remedy="download it again"
            ) from None
        raise WeightsError(
            f"{file} holds Python objects besides tensors; code in it was not run",
            remedy="name a file of tensors alone, e.g. save its state_dict()",
        ) from None
    except Exception as error:
        raise WeightsError(
            f"{file} cannot be read: {reason(error)}", remedy="download it again"
        ) from None
    for name, tensor in _find_entry(file, content, entry).items():
        if not isinstance(tensor, torch.Tensor):
            kind = type(tensor).__name__
            raise WeightsError(
                f"{file}: {name} is of type {kind}, not a tensor", remedy="name other weights"
            )
        array = _as_numpy(torch, tensor)
        yield name, FileTensor(array.shape, array.dtype, array.__getitem__)


def _find_entry(file: Path, content: Any, entry: str | None) -> Mapping[str, Any]:
    """Return the mapping of names to tensors inside the content of a .pt."""
    nested = lambda: [k for k, v in content.items() if isinstance(v, Mapping) and v]
    if not isinstance(content, Mapping):
        kind = type(content).__name__
        raise WeightsError(
            f"{file} holds a {kind}, not tensors by name", remedy="name other weights"
        )
    if entry is not None:
        if entry not in nested():
            raise WeightsError(
                f"is not in {file}",
                field="entry",
                value=entry,
                remedy=f"it has {', '.join(map(str, nested())) or 'none'}",
            )
        content = content[entry]
    while nested():
        found = [key for key in _ENTRIES if key in nested()] or nested()
        content = content[found[0]]
    return content


def _as_numpy(torch: Any, tensor: Any) -> np.ndarray:
    """View the tensor's memory in numpy; types that numpy lacks are viewed by their bits."""
    bits = {torch.bfloat16: (torch.int16, ml_dtypes.bfloat16)}
    for name in ("float8_e4m3fn", "float8_e5m2"):
        bits[getattr(torch, name)] = (torch.int8, getattr(ml_dtypes, name))
    if tensor.dtype not in bits:
        return tensor.detach().numpy()
    integer, dtype = bits[tensor.dtype]
    return tensor.detach().view(integer).numpy().view(dtype)


def _unwrapped(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "model" else parts)


def _digest(file: Path) -> bytes:
    size = file.stat().st_size
    digest = hashlib.sha256(size.to_bytes(8, "little"))
    with file.open("rb") as opened:
        digest.update(opened.read(16 * _SAMPLE))
        for k in range(17):
            opened.seek(max(size - _SAMPLE, 0) * k // 16)
            digest.update(opened.read(_SAMPLE))
    return digest.digest()
