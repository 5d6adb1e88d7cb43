"""Conversion of weights on disk: import into our folder, export to other layouts."""

import time
from collections.abc import Iterable
from typing import NamedTuple

import jax
from etils import epath

from arl2_jax.config import to_config_dict
from arl2_jax.errors import StorageError, WeightsError
from arl2_jax.storage import absolute
from arl2_jax.weights.export import export_params
from arl2_jax.weights.facts import model_config
from arl2_jax.weights.folder import save_params
from arl2_jax.weights.layout import detect_layout
from arl2_jax.weights.layouts.transformer import LAYOUTS
from arl2_jax.weights.load import load_params
from arl2_jax.weights.release import transformer_of
from arl2_jax.weights.tensors import open_tensors


class Imported(NamedTuple):
    """Facts about an import.

    Attributes:
      layout: name of the layout.
      tensors: number of tensors that were read.
      bytes_read: their size in the file.
      parameters: number of parameters that were written.
      read_seconds, write_seconds: time of reading and of writing.
    """

    layout: str
    tensors: int
    bytes_read: int
    parameters: int
    read_seconds: float
    write_seconds: float


def import_weights(
    path: epath.PathLike,
    out: epath.PathLike,
    *,
    hybrid_layers: Iterable[int] | None = None,
    entry: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> Imported:
    """Read a transformer in any layout and write a folder of `save_params`.

    Args:
      path, entry: as in `load_params`.
      out: the folder to write.
      hybrid_layers: layers to be hybrid; by default those that are hybrid in the file.
      dtype: of the matrices, float32 or bfloat16; small parameters stay float32.
      overwrite: whether to replace an existing folder.

    Raises:
      WeightsError: as `load_params`.
      StorageError: the folder exists already, or cannot be written.
    """
    target = absolute(out)
    if target.exists() and not overwrite:
        raise StorageError(
            f"{target} is there already", remedy="name another folder, or pass overwrite=True"
        )
    source = transformer_of(path)
    if (source / "params").exists():
        raise WeightsError(
            f"{source} is a folder of this program already", remedy="name weights in another layout"
        )
    choices = {} if hybrid_layers is None else {"hybrid_layers": tuple(hybrid_layers)}
    tensors = open_tensors(source, entry)
    layout = detect_layout(tensors, LAYOUTS, source)
    cfg = model_config(source, entry=entry, dtype=dtype, **choices)
    start = time.perf_counter()
    params = load_params(source, cfg, precision="compute", entry=entry)
    read = time.perf_counter()
    save_params(target, params, to_config_dict(cfg))
    return Imported(
        layout.name,
        len(tensors),
        sum(tensor.size for tensor in tensors.values()),
        sum(leaf.size for leaf in jax.tree.leaves(params)),
        read - start,
        time.perf_counter() - read,
    )


def export_weights(
    path: epath.PathLike,
    out: epath.PathLike,
    *,
    layout: str = "arl2",
    lora: str = "apart",
    extras: str = "refuse",
    entry: str | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
) -> None:
    """Read a transformer in any layout and write it in another; see `export_params`.

    Args:
      path, entry: as in `load_params`.
      out, layout, lora, extras, overwrite: as in `export_params`.
      dtype: of the matrices, float32 or bfloat16; small parameters stay float32.
    """
    cfg = model_config(path, entry=entry, dtype=dtype)
    params = load_params(path, cfg, precision="compute", entry=entry)
    export_params(out, params, cfg, layout, lora, extras, overwrite=overwrite)
