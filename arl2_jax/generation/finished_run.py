"""Videos from the models of a finished run."""

import dataclasses
import json

from etils import epath

from arl2_jax.codecs import make_codec
from arl2_jax.config import Config, from_config_dict
from arl2_jax.errors import ConfigError, StorageError
from arl2_jax.generation.make_video import VideoModel, make_video, read_past
from arl2_jax.generation.release_paths import ReleasePaths
from arl2_jax.generation.text_conditioning import TextConditioning, encode_text
from arl2_jax.text import embed_caption
from arl2_jax.weights.folder import load_params_folder

MODELS = ("teacher", "stage1", "stage2", "control", "control_local")


def write_from_run(
    run: epath.PathLike,
    model: str,
    *,
    prompt: str,
    frames: int | None,
    out: epath.PathLike,
    paths: ReleasePaths,
    condition: str | None = None,
    negative_prompt: str = "",
    leak: float | None = None,
    seed: int = 0,
) -> None:
    """Generate a video with one of a run's models and write it as an mp4 file.

    Args:
      run: the run's folder.
      model: one of `MODELS`.
      prompt: text, embedded like the captions in training.
      frames: pixel frames to generate, whole blocks; by default four training clips.
      out: file to write.
      paths: text encoder and VAE, for runs on latents of Wan's VAE.
      condition: a video file; its beginning, half a training clip, comes first and is continued.
      negative_prompt: text that guidance leads away from, if the text encoder is Wan's.
      leak: as `make_video` takes it.
      seed: seed of the noise.

    Raises:
      UserError: what is wrong, in one line with the remedy, before anything is compiled.
    """
    config = read_run_config(run)
    found = _find(epath.Path(run), model, config, paths)
    if frames is None:
        frames = found.codec.pixel_frames(4 * config.data.frames)
    past = None
    if condition is not None:
        half = max(config.blocks // 2, 1) * config.model.frames_per_block
        past = read_past(condition, found, half, (config.data.height, config.data.width))
    cfg, wan = found.cfg, config.data.codec == "wan_vae"
    text = lambda: (
        encode_text(paths.open_text_encoder(), prompt, negative_prompt, cfg, found.sampler)
        if wan
        else TextConditioning(embed_caption(prompt, cfg.text_len, cfg.text_dim))
    )
    make_video(found, text, frames=frames, out=out, past=past, leak=leak, seed=seed)


def teacher_of_run(run: epath.PathLike) -> Config:
    """Return the configuration of a run, with its teacher's weights in `teacher.weights`.

    Raises:
      StorageError: there is no such run.
      ConfigError: its teacher is not finished.
    """
    folder, config = epath.Path(run), read_run_config(run)
    if "teacher" not in config.phases:
        return config
    _check_trained(folder, "teacher")
    weights = dataclasses.replace(config.teacher, weights=str(folder / "teacher" / "weights"))
    return dataclasses.replace(config, teacher=weights)


def read_run_config(run: epath.PathLike) -> Config:
    """Read the configuration that a run keeps in its folder.

    Raises:
      StorageError: there is none, or it is damaged.
    """
    run = epath.Path(run)
    if not (run / "config.json").exists():
        raise StorageError(
            f"{run} is not the folder of a run: config.json is missing", remedy="name another"
        )
    try:
        return from_config_dict(json.loads((run / "config.json").read_text()))
    except json.JSONDecodeError as error:
        raise StorageError(
            f"{run / 'config.json'} is damaged: {error}", remedy="name another run"
        ) from None


def _check_trained(run: epath.Path, model: str) -> None:
    trained = [name for name in MODELS if (run / name / "summary.json").exists()]
    if model not in trained:
        raise ConfigError(
            f"{run} has no finished model {model!r}",
            remedy=f"it has {', '.join(trained) or 'none'}",
        )


def _find(run: epath.Path, model: str, config: Config, paths: ReleasePaths) -> VideoModel:
    _check_trained(run, model)
    gates = {"control": "zero", "control_local": "local"}
    cfg = config.model.teacher() if model == "teacher" else config.model
    codec = (
        paths.load_codec(config.data.vae) if config.data.codec == "wan_vae" else make_codec(config)
    )
    assert codec is not None  # only Wan's codec may lack weights
    return VideoModel(
        dataclasses.replace(cfg, memory_gate=gates.get(model, cfg.memory_gate)),
        lambda: load_params_folder(run / model / "weights")[0],
        config.sampler,
        codec,
        config.latent_shape,
        config.data.fps,
    )
