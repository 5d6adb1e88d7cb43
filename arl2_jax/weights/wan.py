"""The original layout of Wan2.1's weights: safetensors files and their names of tensors."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import einops
import ml_dtypes  # noqa: F401 - gives numpy the bfloat16 that safetensors asks it for
import numpy as np
from safetensors import SafetensorError, safe_open

from arl2_jax.weights.errors import WeightsError

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"

# Source name, path in our tree, and how the axes move (einops): linear layers are [o, i] there.
TABLE = (
    (r"patch_embedding\.weight", "patch_embedding/kernel", "o c t h w -> (t h w c) o"),
    (r"patch_embedding\.bias", "patch_embedding/bias", "o -> o"),
    (r"(text|time)_embedding\.0\.weight", r"\1_embedding/fc1/kernel", "o i -> i o"),
    (r"(text|time)_embedding\.0\.bias", r"\1_embedding/fc1/bias", "o -> o"),
    (r"(text|time)_embedding\.2\.weight", r"\1_embedding/fc2/kernel", "o i -> i o"),
    (r"(text|time)_embedding\.2\.bias", r"\1_embedding/fc2/bias", "o -> o"),
    (r"time_projection\.1\.weight", "time_projection/kernel", "o i -> i o"),
    (r"time_projection\.1\.bias", "time_projection/bias", "o -> o"),
    (r"head\.modulation", "head/modulation", "1 n c -> n c"),
    (r"head\.head\.weight", "head/linear/kernel", "o i -> i o"),
    (r"head\.head\.bias", "head/linear/bias", "o -> o"),
    (
        r"blocks\.(\d+)\.(self|cross)_attn\.([qkvo])\.weight",
        r"blocks/\1/\2_attn/\3/kernel",
        "o i -> i o",
    ),
    (r"blocks\.(\d+)\.(self|cross)_attn\.([qkvo])\.bias", r"blocks/\1/\2_attn/\3/bias", "o -> o"),
    (
        r"blocks\.(\d+)\.(self|cross)_attn\.norm_([qk])\.weight",
        r"blocks/\1/\2_attn/norm_\3/scale",
        "c -> c",
    ),
    (r"blocks\.(\d+)\.norm3\.weight", r"blocks/\1/norm3/scale", "c -> c"),
    (r"blocks\.(\d+)\.norm3\.bias", r"blocks/\1/norm3/bias", "c -> c"),
    (r"blocks\.(\d+)\.ffn\.0\.weight", r"blocks/\1/ffn/fc1/kernel", "o i -> i o"),
    (r"blocks\.(\d+)\.ffn\.0\.bias", r"blocks/\1/ffn/fc1/bias", "o -> o"),
    (r"blocks\.(\d+)\.ffn\.2\.weight", r"blocks/\1/ffn/fc2/kernel", "o i -> i o"),
    (r"blocks\.(\d+)\.ffn\.2\.bias", r"blocks/\1/ffn/fc2/bias", "o -> o"),
    (r"blocks\.(\d+)\.modulation", r"blocks/\1/modulation", "1 n c -> n c"),
)


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON file that comes with weights; a damaged one is a WeightsError."""
    try:
        return json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise WeightsError(f"{file} cannot be read: {error}; download it again") from None


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder: the single file, or the shards of its index.

    Raises:
      WeightsError: one line naming the first file that is missing.
    """
    if not (path / INDEX).exists():
        return [path / SINGLE]
    names = set(read_json(path / INDEX).get("weight_map", {}).values())
    if not names:
        raise WeightsError(f"{path / INDEX} lists no files; download it again")
    files = [path / name for name in sorted(names)]
    for file in files:
        if not file.exists():
            raise WeightsError(
                f"{file} is missing: {path / INDEX} lists it among {len(files)} files; download it"
            )
    return files


def read_wan(files: list[Path], targets: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Reads tensors of the original layout, each source once into each target once.

    Args:
      files: safetensors files.
      targets: shape and dtype of every wanted parameter, by path ("blocks/0/ffn/fc1/kernel").

    Returns:
      Arrays by path, with the shapes and dtypes of `targets`.

    Raises:
      WeightsError: if a file cannot be read (one line), or names and shapes do not match (all of
        them at once).
    """
    sources: dict[str, tuple[Any, str, str]] = {}
    unexpected, misshaped = [], []
    for tensors, name in _tensors(files):
        path, moves = _translate(name)
        if path not in targets or path in sources:
            unexpected.append(name)
            continue
        sources[path] = (tensors, name, moves)
        shape, wanted = tensors.get_slice(name).get_shape(), targets[path].shape
        if _moved_shape(shape, moves) != wanted:
            misshaped.append(f"{name} {shape} (for {path} {list(wanted)})")
    missing = [path for path in targets if path not in sources]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    problems = [f"{len(n)} {kind}: {', '.join(sorted(n))}" for kind, n in kinds.items() if n]
    if problems:
        raise WeightsError(
            f"{files[0].parent} does not hold the weights of this model; {'; '.join(problems)}; "
            "name other weights or change --config.model"
        )
    return {
        path: _read(tensors, name, moves, targets[path].dtype)
        for path, (tensors, name, moves) in sources.items()
    }


def _tensors(files: list[Path]) -> Iterator[tuple[Any, str]]:
    for file in files:
        try:
            tensors = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{file} cannot be read: {error}; download it again") from None
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            yield tensors, name


def _translate(name: str) -> tuple[str, str]:
    for pattern, path, moves in TABLE:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(path), moves
    return "", ""


def _moved_shape(shape: list[int], moves: str) -> tuple[int, ...] | None:
    try:
        return einops.rearrange(np.broadcast_to(np.int8(0), shape), moves).shape
    except einops.EinopsError:
        return None


def _read(tensors: Any, name: str, moves: str, dtype: Any) -> np.ndarray:
    return np.ascontiguousarray(einops.rearrange(tensors.get_tensor(name), moves), dtype)
