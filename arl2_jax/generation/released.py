"""Videos from released weights, in any known layout."""

import dataclasses

import jax
from etils import epath

from arl2_jax.config import ModelConfig, SamplerConfig
from arl2_jax.errors import ConfigError, WeightsError
from arl2_jax.generation.make_video import VideoModel, make_video, read_past
from arl2_jax.generation.release_paths import ReleasePaths
from arl2_jax.generation.text_conditioning import encode_text
from arl2_jax.weights import find_release, load_params, model_config

# Frames a second of every Wan2.1 model.
FPS = 16.0


@dataclasses.dataclass(frozen=True)
class Resolution:
    """Rows and columns of a video in pixels."""

    height: int = 480
    width: int = 832


def write_from_weights(
    weights: str,
    *,
    prompt: str,
    frames: int | None,
    out: epath.PathLike,
    paths: ReleasePaths,
    sampler: SamplerConfig,
    resolution: Resolution = Resolution(),
    condition: str | None = None,
    negative_prompt: str = "",
    frames_per_block: int | None = None,
    entry: str | None = None,
    dtype: str | None = None,
    leak: float | None = None,
    seed: int = 0,
) -> None:
    """Generate a video from a prompt and write it as an mp4 file.

    Args:
      weights: a release's folder, a file of its transformer, or a folder of `save_params`.
      prompt: description of the video.
      frames: pixel frames to generate, whole blocks; by default about five seconds.
      out: file to write.
      paths: text encoder, tokenizer and VAE; those that are None are looked for in `weights`.
      sampler: how each block is denoised.
      resolution: size of the video.
      condition: a video file, whose first block comes first and is continued.
      negative_prompt: text that guidance leads away from.
      frames_per_block: latent frames denoised together, if the weights do not say.
      entry: which of the models in a .pt file.
      dtype: compute type; by default bfloat16, on CPUs float32.
      leak: as `make_video` takes it.
      seed: seed of the noise.

    Raises:
      UserError: what is wrong, in one line with the remedy, before anything is compiled.
    """
    paths = paths.within(weights)
    found = find_video_model(
        weights, paths, sampler, resolution, frames_per_block, entry=entry, dtype=dtype
    )
    f = found.cfg.frames_per_block
    if frames is None:
        given = 0 if condition is None else f
        whole = max(21 // f * f, given + f)
        frames = found.codec.pixel_frames(whole) - found.codec.pixel_frames(given)
    past = None
    if condition is not None:
        past = read_past(condition, found, f, (resolution.height, resolution.width))
    text = lambda: encode_text(
        paths.open_text_encoder(), prompt, negative_prompt, found.cfg, sampler
    )
    make_video(found, text, frames=frames, out=out, past=past, leak=leak, seed=seed)


def find_video_model(
    weights: str,
    paths: ReleasePaths,
    sampler: SamplerConfig,
    resolution: Resolution,
    frames_per_block: int | None = None,
    *,
    entry: str | None = None,
    dtype: str | None = None,
) -> VideoModel:
    """Return the transformer of `weights` with the VAE of `paths`, without reading parameters.

    Args:
      weights, paths, sampler, resolution, frames_per_block, entry, dtype: as in
        `write_from_weights`.

    Raises:
      WeightsError: a file is missing or of another model.
      ConfigError: the resolution does not fit the model.
    """
    path = find_release(weights).transformer or weights
    choices = {} if frames_per_block is None else {"frames_per_block": frames_per_block}
    cfg = model_config(path, entry=entry, **choices)
    dtype = dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    cfg = dataclasses.replace(cfg, dtype=dtype)
    codec = paths.load_codec()
    if codec.channels != cfg.in_dim:
        raise WeightsError(
            f"makes latents of {codec.channels} channels, but {path} takes {cfg.in_dim}",
            field="vae",
            value=paths.vae,
            remedy="name the VAE that the model was trained with",
        )
    return VideoModel(
        cfg,
        lambda: load_params(path, cfg, precision="compute", entry=entry),
        sampler,
        codec,
        _latent_shape(resolution, codec.spatial_factor, cfg),
        FPS,
    )


def _latent_shape(resolution: Resolution, factor: int, cfg: ModelConfig) -> tuple[int, int, int]:
    sizes = []
    for i, name in enumerate(("height", "width"), start=1):
        pixels, unit = getattr(resolution, name), factor * cfg.patch_size[i]
        if pixels < 1 or pixels % unit:
            near = max(round(pixels / unit), 1) * unit
            raise ConfigError(
                f"must be a multiple of {unit} pixels",
                field=name,
                value=pixels,
                remedy=f"take {near}",
            )
        sizes.append(pixels // factor)
    return sizes[0], sizes[1], cfg.in_dim
