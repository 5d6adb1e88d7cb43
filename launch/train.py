"""Trains: teacher, conversion in two stages, and the report at the end.

    python launch/train.py --config=configs/tiny.py
    python launch/train.py --config=configs/tiny.py --config.stage2.steps=500

The run lives in --config.train.workdir. Started again with the same configuration, it goes on
where it stopped.
"""

import logging as std_logging
import sys

from absl import app, flags, logging

from arl2_jax import command_line

_CONFIG = command_line.config_flag()


def main(argv):
    """Flags -> config -> the run."""
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]}; fields are set as --config.NAME=VALUE")
    # Imported late: a mistyped flag should not wait for jax.
    from arl2_jax.config import ConfigError, from_config_dict
    from arl2_jax.evaluation.report import write_report
    from arl2_jax.evaluation.table import summary_table
    from arl2_jax.training.pipeline import convert, prepare

    logging.set_verbosity(logging.INFO)
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)
    try:
        config = from_config_dict(_CONFIG.value)
        folder, data, params = prepare(config)
        converted = convert(config, folder, data, params)
        report = write_report(config, folder, data, converted)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(summary_table(report))
    print(f"report, pictures and videos: {folder / 'report'}")


def parse(argv):
    """Parses flags; a wrong one is an error of one line."""
    flags.mark_flag_as_required("config")
    return command_line.parse_config(argv, _CONFIG)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
