"""Paths of the parts of a released model."""

from pathlib import Path
from typing import NamedTuple

from etils import epath

from arl2_jax.storage import absolute, is_remote


class Release(NamedTuple):
    """Paths of a release's parts; None for a missing part.

    Attributes:
      transformer: file or folder for `load_params`.
      text_encoder: file or folder for `load_text_encoder`.
      tokenizer: tokenizer.json.
      vae: file or folder for `load_vae`.
    """

    transformer: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    vae: Path | None


def find_release(folder: epath.PathLike) -> Release:
    """Find the parts in a folder of Wan's release, of a Diffusers pipeline, or of `save_params`.

    Args:
      folder: the folder; a file is taken as a transformer alone.
    """
    source = absolute(folder)
    if is_remote(source) or not source.is_dir():
        return Release(Path(source) if source.exists() else None, None, None, None)
    root = Path(source)
    first = lambda *patterns: next((p for pattern in patterns for p in root.glob(pattern)), None)
    transformer = first("transformer")
    if transformer is None and first("params", "*.safetensors", "*.safetensors.index.json", "*.pt"):
        transformer = root
    return Release(
        transformer,
        first("text_encoder", "models_t5*.pth", "models_t5*.safetensors"),
        first("tokenizer/tokenizer.json", "google/*/tokenizer.json", "tokenizer.json"),
        first("vae", "*VAE*.pth", "*VAE*.safetensors"),
    )


def transformer_of(path: epath.PathLike) -> epath.Path:
    """Return the transformer in a release's folder; another path is returned unchanged."""
    return epath.Path(find_release(path).transformer or absolute(path))
