"""Shared parts of the commands: groups of flags, and one-line errors that name flags."""

import dataclasses
import os
import re
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging
from ml_collections import config_flags

from arl2_jax.config import Config, SamplerConfig
from arl2_jax.errors import ConfigError, UserError

if TYPE_CHECKING:
    from arl2_jax.generation.release_paths import ReleasePaths
    from arl2_jax.generation.released import Resolution

# The library's fields that the groups of flags below set, where their names differ from the flags'.
SAMPLER_NAMES = {f"sampler.{field.name}": field.name for field in dataclasses.fields(SamplerConfig)}
MODEL_NAMES = {
    "model.frames_per_block": "frames_per_block",
    "model.hybrid_layers": "hybrid_layers",
    "model.dtype": "dtype",
    "model.delta.leak": "leak",
}
_SAVE_MEMORY = (
    "make the video shorter or smaller, use a model with more hybrid layers, or set --vae_tile"
)
# A field such as model.dim, or an argument with its value, such as overwrite=True.
_NAME = re.compile(r"(?<![\w./-])(?:(?:\w+\.)+\w+(?![\w/\[])|\w+(?==))")


def config_flag() -> flags.FlagHolder:
    """Define the flag that names a configuration file; --config.NAME=VALUE sets a field."""
    return config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=False)


def parse_flags(argv: Sequence[str], config: flags.FlagHolder | None = None) -> Sequence[str]:
    """Parse flags; exit with a one-line error if one is wrong.

    Args:
      argv: arguments of the command.
      config: the result of `config_flag`, if the command has such a flag.

    Returns:
      The arguments that are not flags.
    """
    try:
        rest = flags.FLAGS(argv)
        if config is not None and config.value is not None:
            config.value.keys()  # a file that could not be loaded is reported at its first use
        return rest
    except (AttributeError, KeyError) as error:  # a field that the configuration does not have
        reason = error.args[0]
        if isinstance(reason, KeyError):  # as ml_collections wraps it
            reason = reason.args[0]
        # The name, and perhaps a second line with a suggestion.
        name, _, hint = (line.strip("\"'") for line in str(reason).partition("\n"))
        given = [flag.split("=")[0].lstrip("-") for flag in argv[1:]]
        field = next((flag for flag in given if flag.split(".")[-1] == name), name)
        hint = hint or "the fields are those of arl2_jax/config"
        sys.exit(f"error: unknown config field {field}; {hint[0].lower()}{hint[1:]}")
    except OSError as error:
        reason = str(error).splitlines()[-1].strip()
        sys.exit(f"error: the file of --config cannot be loaded: {reason}")
    except (flags.Error, ValueError, TypeError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


def entry_flag() -> flags.FlagHolder:
    """Define the flag that chooses between the models of a .pt file."""
    return flags.DEFINE_enum(
        "entry", None, ["generator", "generator_ema"], "Which model of a .pt file."
    )


def resolution_flags() -> Callable[[], "Resolution"]:
    """Define the flags of a video's size; return a function that reads it from them."""
    height = flags.DEFINE_integer("height", 480, "Rows of pixels.")
    width = flags.DEFINE_integer("width", 832, "Columns of pixels.")

    def make() -> "Resolution":
        from arl2_jax.generation.released import Resolution

        return Resolution(height.value, width.value)

    return make


def sampler_flags() -> Callable[[], SamplerConfig]:
    """Define the flags of a sampler; return a function that makes it from them."""
    default = SamplerConfig()
    method = flags.DEFINE_enum("method", default.method, ["few_step", "euler"], "Sampler.")
    timesteps = flags.DEFINE_list(
        "timesteps", [f"{t:g}" for t in default.timesteps], "Of the few-step sampler."
    )
    steps = flags.DEFINE_integer("steps", default.steps, "Of the Euler sampler.")
    shift = flags.DEFINE_float("shift", default.shift, "Shift of the noise levels.")
    guidance = flags.DEFINE_float(
        "guidance", default.guidance, "Guidance of the Euler sampler; 1 is off."
    )
    context = flags.DEFINE_float(
        "context_noise",
        default.context_noise,
        "Noise level in [0, 1) of blocks as they are remembered; 0 remembers them clean.",
    )

    def make() -> SamplerConfig:
        try:
            levels = tuple(float(t) for t in timesteps.value)
        except ValueError:
            raise ConfigError(
                "must be numbers, such as 1000,500",
                field="timesteps",
                value=",".join(timesteps.value),
            ) from None
        chosen: Any = method.value  # one of the field's choices, as the flag is
        return SamplerConfig(
            chosen, levels, steps.value, shift.value, guidance.value, context.value
        )

    return make


def release_flags() -> Callable[[], "ReleasePaths"]:
    """Define the flags of text encoder, tokenizer and VAE; return a function for their paths."""
    release = flags.DEFINE_string("release", None, "Folder with text encoder, tokenizer and VAE.")
    text_encoder = flags.DEFINE_string("text_encoder", None, "Weights of the text encoder.")
    tokenizer = flags.DEFINE_string("tokenizer", None, "tokenizer.json, or its folder.")
    vae = flags.DEFINE_string("vae", None, "Weights of the VAE.")
    cache = flags.DEFINE_string(
        "cache", os.path.join("~", ".cache", "arl2_jax", "prompts"), "Encoded prompts; empty: none."
    )
    tile = flags.DEFINE_list(
        "vae_tile", None, "Rows,columns of latents that the VAE computes together, to save memory."
    )

    def make() -> "ReleasePaths":
        from arl2_jax.generation.release_paths import ReleasePaths

        folder = os.path.expanduser(cache.value) if cache.value else None
        size = None if tile.value is None else _pair(tile.value, "vae_tile", 2, "30,52")
        own = ReleasePaths(text_encoder.value, tokenizer.value, vae.value, folder, size)
        return own.within(release.value)

    return make


def layers_flag() -> Callable[[], tuple[int, ...] | None]:
    """Define the flag of layers, such as 0-13,20; return a function that lists them, or None."""
    chosen = flags.DEFINE_list("hybrid_layers", None, "Layers to be converted, such as 0-13,20.")

    def make() -> tuple[int, ...] | None:
        return None if chosen.value is None else _layers(chosen.value)

    return make


def _layers(values: Sequence[str]) -> tuple[int, ...]:
    layers = set()
    try:
        for value in values:
            first, _, last = value.partition("-")
            found = range(int(first), int(last or first) + 1)
            if not found:
                raise ValueError
            layers.update(found)
    except ValueError:
        layers.clear()
    if not layers:
        raise ConfigError(
            "must be layers or rising ranges of them, such as 0-13,20",
            field="hybrid_layers",
            value=",".join(values),
        )
    return tuple(sorted(layers))


def latent_shape_flag() -> Callable[[], tuple[int, int]]:
    """Define the flag of a latent frame's size; return a function for (rows, columns)."""
    size = flags.DEFINE_list("latent_shape", ["60", "104"], "Rows,columns of random latents.")

    return lambda: _pair(size.value, "latent_shape", 1, "60,104")


def _pair(values: Sequence[str], field: str, least: int, example: str) -> tuple[int, int]:
    """Return the two whole numbers of a list flag."""
    try:
        rows, columns = (int(value) for value in values)
    except ValueError:
        rows = columns = least - 1
    if min(rows, columns) < least:
        raise ConfigError(
            f"must be two whole numbers of at least {least}, such as {example}",
            field=field,
            value=",".join(values),
        )
    return rows, columns


def is_config_field(name: str) -> bool:
    """Tell whether a name such as "model.delta.leak" is a field of `Config`."""
    kind: Any = Config
    for part in name.split("."):
        fields = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in fields:
            return False
        kind = fields[part]
    return True


def name_flags(error: UserError, flag_of: Callable[[str], str | None]) -> str:
    """Return the line of an error with flags in place of fields and arguments.

    Args:
      error: the error.
      flag_of: field or argument -> name of its flag, or None if no flag sets it.
    """
    field = error.field
    if field and (flag := flag_of(field)):
        field = f"--{flag}"
    problem = _flags_in(error.problem, flag_of)
    remedy = error.remedy and _flags_in(error.remedy, flag_of)
    return str(UserError(problem, field=field, value=error.value, remedy=remedy))


def _flags_in(text: str, flag_of: Callable[[str], str | None]) -> str:
    replace = lambda name: f"--{flag}" if (flag := flag_of(name[0])) else name[0]
    return _NAME.sub(replace, text)


def run(
    main: Callable[[], None],
    *,
    one_of: Sequence[str] = (),
    required: Sequence[str] = (),
    config: flags.FlagHolder | None = None,
    names: Mapping[str, str] | None = None,
    save_memory: str = _SAVE_MEMORY,
):
    """Parse the flags and call `main`; print user errors on one line that names flags.

    Args:
      main: called without arguments once the flags have values.
      one_of: names of flags, exactly one of which must be given.
      required: names of flags that must be given.
      config: the flag of a configuration file, if the command has one. Its fields are set by
        --config.FIELD.
      names: field or argument of the library -> flag that sets it, where their names differ.
      save_memory: remedy if the device is out of memory.
    """

    def parse(argv):
        flags.mark_flags_as_required(required)
        if one_of:
            flags.mark_flags_as_mutual_exclusive(one_of, required=True)
        return parse_flags(argv, config)

    def flag_of(name: str) -> str | None:
        flag = (names or {}).get(name, name)
        if flag in flags.FLAGS:
            return flag
        given = config is not None and config.value is not None
        return f"config.{name}" if given and is_config_field(name) else None

    def call(argv):
        if len(argv) > 1:
            how = (
                "flags are set as --NAME=VALUE"
                if config is None
                else ("fields are set as --config.NAME=VALUE")
            )
            sys.exit(f"error: unknown argument {argv[1]}; {how}")
        logging.set_verbosity(logging.WARNING)
        try:
            main()
        except UserError as error:
            sys.exit(f"error: {name_flags(error, flag_of)}")
        except FloatingPointError as error:  # training has diverged
            sys.exit(f"error: {_flags_in(str(error), flag_of)}")
        except RuntimeError as error:  # jax's own error is one, and jax need not be imported
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            sys.exit(f"error: the device is out of memory; {save_memory}")

    app.run(call, flags_parser=parse)
