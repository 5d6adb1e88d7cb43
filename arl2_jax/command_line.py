"""What the commands under `launch/` share: groups of flags, and errors of one line."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging
from ml_collections import config_flags

from arl2_jax.config import ConfigError, SamplerConfig

if TYPE_CHECKING:
    from arl2_jax.generation.encoders import Encoders
    from arl2_jax.generation.released import Picture


_SAVE_MEMORY = (
    "make the video shorter or smaller, use a model with more hybrid layers, or set --vae_tile"
)


def config_flag() -> flags.FlagHolder:
    """Defines the flag that names a configuration file; --config.NAME=VALUE sets a field."""
    return config_flags.DEFINE_config_file("config", None, "Configuration file.", lock_config=False)


def parse_config(argv: Sequence[str], config: flags.FlagHolder) -> Sequence[str]:
    """Parses flags, --config among them; a wrong one is an error of one line.

    Args:
      argv: arguments of the command.
      config: what `config_flag` has returned.

    Returns:
      The arguments that are no flags.
    """
    try:
        rest = flags.FLAGS(argv)
        if config.value is not None:
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
    """Defines the flag that chooses between the models of a .pt file."""
    return flags.DEFINE_enum(
        "entry", None, ["generator", "generator_ema"], "Which model of a .pt file."
    )


def picture_flags() -> Callable[[], "Picture"]:
    """Defines the flags of a video's size; the result makes it of their values."""
    height = flags.DEFINE_integer("height", 480, "Rows of pixels.")
    width = flags.DEFINE_integer("width", 832, "Columns of pixels.")

    def make() -> "Picture":
        from arl2_jax.generation.released import Picture

        return Picture(height.value, width.value)

    return make


def sampler_flags() -> Callable[[], SamplerConfig]:
    """Defines the flags of a sampler; the result makes it of their values."""
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
                f"--timesteps={','.join(timesteps.value)} must be numbers, such as 1000,500"
            ) from None
        chosen: Any = method.value  # one of the field's choices, as the flag is
        return SamplerConfig(
            chosen, levels, steps.value, shift.value, guidance.value, context.value
        )

    return make


def encoder_flags() -> Callable[[], "Encoders"]:
    """Defines the flags that name text encoder, tokenizer and VAE; the result holds the paths."""
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

    def make() -> "Encoders":
        from arl2_jax.generation.encoders import Encoders

        folder = os.path.expanduser(cache.value) if cache.value else None
        size = None if tile.value is None else _tile(tile.value)
        own = Encoders(text_encoder.value, tokenizer.value, vae.value, folder, size)
        return own.within(release.value)

    return make


def layers_flag() -> Callable[[], tuple[int, ...] | None]:
    """Defines the flag that names layers, such as 0-13,20; the result lists them, or is None."""
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
            f"--hybrid_layers={','.join(values)} must be layers or rising ranges of them, such as "
            "0-13,20"
        )
    return tuple(sorted(layers))


def latent_shape_flag() -> Callable[[], tuple[int, int]]:
    """Defines the flag of a latent frame's size; the result is (rows, columns)."""
    size = flags.DEFINE_list("latent_shape", ["60", "104"], "Rows,columns of random latents.")

    def make() -> tuple[int, int]:
        try:
            rows, columns = (int(value) for value in size.value)
        except ValueError:
            raise ConfigError(
                f"--latent_shape={','.join(size.value)} must be two whole numbers, such as 60,104"
            ) from None
        return rows, columns

    return make


def _tile(values: Sequence[str]) -> tuple[int, int]:
    try:
        rows, columns = (int(value) for value in values)
    except ValueError:
        rows = columns = 0
    if min(rows, columns) < 2:
        raise ConfigError(
            f"--vae_tile={','.join(values)} must be two whole numbers of at least 2, such as 30,52"
        )
    return rows, columns


def run(
    main: Callable[[], None],
    *,
    one_of: Sequence[str] = (),
    required: Sequence[str] = (),
    config: flags.FlagHolder | None = None,
    save_memory: str = _SAVE_MEMORY,
):
    """Parses the flags and calls `main`; whatever the user can mend is told in one line.

    Args:
      main: called without arguments once the flags have values.
      one_of: names of flags of which exactly one must be given.
      required: names of flags that must be given.
      config: the flag of a configuration file, where the command has one.
      save_memory: what to do where the device is out of memory.
    """

    def parse(argv):
        flags.mark_flags_as_required(required)
        if one_of:
            flags.mark_flags_as_mutual_exclusive(one_of, required=True)
        if config is not None:
            return parse_config(argv, config)
        try:
            return flags.FLAGS(argv)
        except flags.Error as error:
            sys.exit(f"error: {' '.join(str(error).split())}")

    def call(argv):
        if len(argv) > 1:
            sys.exit(f"error: unknown argument {argv[1]}; flags are set as --NAME=VALUE")
        logging.set_verbosity(logging.WARNING)
        try:
            main()
        except ConfigError as error:
            sys.exit(f"error: {error}")
        except RuntimeError as error:  # jax's own error is one, and jax need not be imported
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            sys.exit(f"error: the device is out of memory; {save_memory}")

    app.run(call, flags_parser=parse)
