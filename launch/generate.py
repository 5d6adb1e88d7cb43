"""Generates a video with a model of a finished run.

    python launch/generate.py --run=runs/tiny-synthetic --model=stage2 \
        --prompt="two sprites on a navy background" --frames=40 --out=video.mp4

With --condition=clip.mp4 the beginning of that video comes first and is continued. The video may be
longer than any clip of training.
"""

import sys

from absl import app, flags, logging

_RUN = flags.DEFINE_string("run", None, "Folder of the run.", required=True)
_MODEL = flags.DEFINE_enum(
    "model", "stage2", ["teacher", "stage1", "stage2", "control"], "Which of the run's models."
)
_PROMPT = flags.DEFINE_string("prompt", "", "Words that describe the video.")
_FRAMES = flags.DEFINE_integer("frames", 40, "Frames to generate, whole blocks.")
_OUT = flags.DEFINE_string("out", "video.mp4", "File to write.")
_CONDITION = flags.DEFINE_string("condition", None, "Video file to continue.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.")


def main(argv):
    """Flags -> the video."""
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]}; flags are set as --NAME=VALUE")
    # Imported late: a mistyped flag should not wait for jax.
    from arl2_jax.config import ConfigError
    from arl2_jax.generation.finished_run import write_generated

    logging.set_verbosity(logging.WARNING)
    try:
        write_generated(
            _RUN.value,
            _MODEL.value,
            prompt=_PROMPT.value,
            frames=_FRAMES.value,
            out=_OUT.value,
            condition=_CONDITION.value,
            seed=_SEED.value,
        )
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(f"video: {_OUT.value}")


def parse(argv):
    """Parses flags; a wrong one is an error of one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
