"""Retention of the memories of stored weights: measures, a JSON file and a picture."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from arl2_jax.config import ModelConfig
from arl2_jax.data.latents import LatentFolder
from arl2_jax.errors import ConfigError
from arl2_jax.evaluation.retention_plot import retention_picture
from arl2_jax.storage import check_writable, write_whole
from arl2_jax.training.retention import in_ranges, retention
from arl2_jax.weights import find_release, load_params, model_config

# Blocks of a clip of random latents.
_BLOCKS = 4


@dataclasses.dataclass(frozen=True)
class ClipChoice:
    """Clips that the memories are measured on.

    Attributes:
      data: folder of stored latents; None for standard normal latents without text.
      clips: number of clips.
      blocks: frame blocks of each, from its start; by default all, and 4 of random latents.
      latent_shape: rows and columns of a frame of random latents.
    """

    data: str | None = None
    clips: int = 1
    blocks: int | None = None
    latent_shape: tuple[int, int] = (60, 104)

    def __post_init__(self):
        for name in ("clips", "blocks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError("must be positive", field=name, value=value)


def inspect_memory(
    weights: str,
    choice: ClipChoice,
    out: epath.PathLike,
    *,
    hybrid_layers: Sequence[int] | None = None,
    frames_per_block: int | None = None,
    entry: str | None = None,
    dtype: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure what the memories of stored weights keep; write a JSON file and a picture.

    Clips are written clean: weights do not say at which noise level they were trained to write.

    Args:
      weights: what `arl2_jax.weights.load_params` reads, or a release's folder.
      choice: the clips.
      out: the JSON file; the picture has the same name and ends in .png.
      hybrid_layers: for weights without hybrid layers, the layers to make hybrid, untrained.
      frames_per_block: latent frames of a block, if the weights do not say.
      entry: which of the models in a .pt file.
      dtype: compute type; by default bfloat16, on CPUs float32.
      seed: seed of random latents and of memories that the weights lack.

    Returns:
      The content of the JSON file, see `arl2_jax.training.retention.retention`.

    Raises:
      UserError: what is wrong, in one line with the remedy, before anything is compiled.
    """
    path, file = find_release(weights).transformer or weights, epath.Path(out)
    if file.suffix != ".json":
        raise ConfigError("must end in .json: its picture ends in .png", field="out", value=out)
    choices = {} if frames_per_block is None else {"frames_per_block": frames_per_block}
    cfg = _with_memories(model_config(path, entry=entry, **choices), path, hybrid_layers)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    cfg = dataclasses.replace(cfg, dtype=dtype)
    clips = read_clips(choice, cfg, seed)
    _warn_of_other_blocks(cfg, clips["latents"].shape)
    check_writable(file.parent, field="out")
    params = load_params(path, cfg, jax.random.key(seed), precision="compute", entry=entry)
    measures = retention(params, cfg, clips)
    # One measure a line: the tables are long.
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in measures.items()]
    write_whole(file, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    write_whole(file.with_suffix(".png"), retention_picture(measures))
    return measures


def _with_memories(
    cfg: ModelConfig, path: epath.PathLike, hybrid_layers: Sequence[int] | None
) -> ModelConfig:
    """Return the model with hybrid layers: its own, or the given ones."""
    if cfg.hybrid_layers and hybrid_layers is not None:
        own = in_ranges(list(cfg.hybrid_layers))
        raise ConfigError(
            f"cannot be chosen: {path} has its own, {own}",
            field="hybrid_layers",
            value=in_ranges(sorted(hybrid_layers)),
            remedy="leave hybrid_layers out",
        )
    if not cfg.hybrid_layers and not hybrid_layers:
        raise ConfigError(
            f"{path} has no hybrid layers",
            remedy="name those to be converted, such as "
            f"hybrid_layers=0-{max(3 * cfg.num_layers // 4 - 1, 0)}",
        )
    if hybrid_layers is not None:
        cfg = dataclasses.replace(cfg, hybrid_layers=tuple(hybrid_layers))
    if cfg.memory_gate == "zero":
        raise ConfigError(
            f"{path} is a control, whose memory is closed: there is nothing to measure",
            remedy="name the converted model",
        )
    return cfg


def _warn_of_other_blocks(cfg: ModelConfig, shape: Sequence[int]) -> None:
    """Warn if clips have blocks of another size than the memory was initialized for."""
    rows, columns = shape[2] // cfg.patch_size[1], shape[3] // cfg.patch_size[2]
    tokens, wanted = cfg.frames_per_block * rows * columns, cfg.delta.block_tokens
    if wanted and tokens != wanted:
        logging.warning(
            "the clips have blocks of %d tokens, but the memory was started for blocks of %d: set "
            "latent_shape or data so that a frame has %d",
            tokens, wanted, wanted // cfg.frames_per_block,
        )  # fmt: skip


def read_clips(choice: ClipChoice, cfg: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Read stored clips or draw random ones: "latents" [N, T, rows, columns, C] and "text".

    Both are float32.

    Raises:
      ConfigError: they do not fit the model, or there are too few.
    """
    if choice.data is not None:
        return _stored_clips(choice, choice.data, cfg)
    size = f"{choice.latent_shape[0]},{choice.latent_shape[1]}"
    _check_patches(choice.latent_shape, cfg, "must be rows and columns", "latent_shape", size)
    frames = (choice.blocks or _BLOCKS) * cfg.frames_per_block
    shape = (choice.clips, frames, *choice.latent_shape, cfg.in_dim)
    text = np.zeros((choice.clips, cfg.text_len, cfg.text_dim), np.float32)
    return {"latents": np.random.default_rng(seed).standard_normal(shape, np.float32), "text": text}


def _stored_clips(choice: ClipChoice, data: str, cfg: ModelConfig) -> dict[str, np.ndarray]:
    folder = LatentFolder(data)
    frames, rows, columns, channels = folder.manifest.latent_shape
    words = f"has latents of {rows},{columns}, which must be rows and columns"
    _check_patches((rows, columns), cfg, words, "data", data)
    text = tuple(folder.manifest.text_shape)
    if channels != cfg.in_dim or text != (cfg.text_len, cfg.text_dim):
        raise ConfigError(
            f"has latents of {channels} channels and texts of {text}, but the model takes "
            f"{cfg.in_dim} and {(cfg.text_len, cfg.text_dim)}",
            field="data",
            value=data,
            remedy="name data of its kind",
        )
    if choice.clips > len(folder):
        raise ConfigError(
            f"is more than the {len(folder)} of data={data}", field="clips", value=choice.clips
        )
    blocks = choice.blocks or frames // cfg.frames_per_block
    if not 0 < blocks * cfg.frames_per_block <= frames:
        raise ConfigError(
            f"of {cfg.frames_per_block} frames are more than the {frames} frames of a clip "
            f"of data={data}",
            field="blocks",
            value=max(blocks, 1),
            remedy="take fewer, or other data",
        )
    found = [folder[i] for i in range(choice.clips)]
    stacked = {name: np.stack([clip[name] for clip in found]) for name in ("latents", "text")}
    return stacked | {"latents": stacked["latents"][:, : blocks * cfg.frames_per_block]}


def _check_patches(
    size: tuple[int, int], cfg: ModelConfig, words: str, field: str, value: str
) -> None:
    """Raise ConfigError unless patches tile a frame of rows x columns."""
    _, *patch = cfg.patch_size
    if any(n < 1 or n % p for n, p in zip(size, patch, strict=True)):
        problem = f"{words} that are multiples of the patch {patch[0]} x {patch[1]}"
        raise ConfigError(problem, field=field, value=value)
