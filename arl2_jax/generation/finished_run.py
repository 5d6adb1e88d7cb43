"""Videos from the models of a finished run of `launch/train.py`."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from arl2_jax.config import Config, ConfigError, ModelConfig, from_config_dict
from arl2_jax.data import Codec, embed_caption, make_codec
from arl2_jax.data.videos import read_frames
from arl2_jax.generation.generator import Generator
from arl2_jax.generation.video import write_video
from arl2_jax.weights.folder import load_params_folder

MODELS = ("teacher", "stage1", "stage2", "control")


def write_generated(
    run: epath.PathLike,
    model: str,
    *,
    prompt: str,
    frames: int,
    out: epath.PathLike,
    condition: str | None = None,
    seed: int = 0,
) -> None:
    """Generates a video and writes it as an mp4 file.

    Args:
      run: the run's folder.
      model: one of `MODELS`.
      prompt: words, embedded as the captions of training are.
      frames: frames to generate, whole blocks.
      out: the file.
      condition: a video file; its beginning, half a training clip, comes first and is continued.
      seed: seed of the noise.

    Raises:
      ConfigError: before anything is compiled, one line naming what is wrong and the remedy.
    """
    config, cfg, weights = _find(epath.Path(run), model)
    codec = make_codec(config)
    latent_frames = _latent_frames(frames, codec, cfg)
    _check_writable(epath.Path(out))
    past = None if condition is None else _read_past(Path(condition), config, codec)
    text = embed_caption(prompt, cfg.text_len, cfg.text_dim)
    params, _ = load_params_folder(weights)
    generator = Generator(
        cfg, params, config.sampler, latent_shape=config.latent_shape, codec=codec
    )
    # This kind of key compiles at once on CPUs.
    key = jax.random.key(seed, impl="rbg")
    video, latents = ([], None) if past is None else ([past], _encode(past, codec))
    stream = generator.stream(text, key=key, past=latents, frames=latent_frames)
    with tqdm(total=frames, unit="frame") as progress:
        for block in stream:
            video.append(np.asarray(block)[0])
            progress.update(len(video[-1]))
    write_video(out, np.concatenate(video), config.data.fps)


def _find(run: epath.Path, model: str) -> tuple[Config, ModelConfig, epath.Path]:
    """The run's configuration, the model's, and the folder of its weights."""
    if not (run / "config.json").exists():
        raise ConfigError(f"{run} is not the folder of a run: config.json is missing; name another")
    try:
        config = from_config_dict(json.loads((run / "config.json").read_text()))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{run / 'config.json'} is damaged: {error}; name another run") from None
    if config.data.source == "latents":
        raise ConfigError(
            f"{run} was trained on stored latents and text embeddings, whose decoder and text "
            "encoder are not part of this program; call arl2_jax.Generator with your own"
        )
    trained = [name for name in MODELS if (run / name / "summary.json").exists()]
    if model not in trained:
        raise ConfigError(
            f"{run} has no finished model {model!r}; it has {', '.join(trained) or 'none'}"
        )
    changes = {"teacher": {"hybrid_layers": ()}, "control": {"memory_gate": "zero"}}
    return (
        config,
        dataclasses.replace(config.model, **changes.get(model, {})),
        run / model / "weights",
    )


def _latent_frames(frames: int, codec: Codec, cfg: ModelConfig) -> int:
    block = codec.pixel_frames(cfg.frames_per_block)
    if frames < 1 or frames % block:
        raise ConfigError(f"frames={frames} must be a positive multiple of the {block} of a block")
    return frames // block * cfg.frames_per_block


def _check_writable(out: epath.Path) -> None:
    probe = out.parent / f"{out.name}.unfinished"
    try:
        if out.is_dir():
            raise IsADirectoryError("it is a folder")
        out.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"cannot write {out}: {reason}; name another file") from None


def _read_past(path: Path, config: Config, codec: Codec) -> np.ndarray:
    """Half a training clip, in whole blocks: uint8 [F, H, W, 3]."""
    latent_frames = max(config.blocks // 2, 1) * config.model.frames_per_block
    size = config.data.height, config.data.width
    return read_frames(path, config.data.fps, codec.pixel_frames(latent_frames), size)


def _encode(pixels: np.ndarray, codec: Codec) -> np.ndarray:
    return np.asarray(codec.encode(pixels[None].astype(np.float32) / 127.5 - 1), np.float32)
