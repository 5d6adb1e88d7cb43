"""Train: teacher, conversion in two stages, and the report at the end.

    python launch/train.py --config=configs/tiny.py
    python launch/train.py --config=configs/tiny.py --config.stage2.steps=500

The run writes to --config.train.workdir. Started again with the same configuration, it resumes
where it stopped.
"""

import logging as std_logging

from absl import logging

import command_line

_CONFIG = command_line.config_flag()


def main():
    """Run the configuration that the flags describe."""
    # Imported late: a mistyped flag should not wait for jax.
    from arl2_jax.config import from_config_dict
    from arl2_jax.evaluation.report import write_report
    from arl2_jax.evaluation.table import summary_table
    from arl2_jax.training.pipeline import convert, prepare

    logging.set_verbosity(logging.INFO)
    std_logging.getLogger("jax").setLevel(std_logging.WARNING)
    config = from_config_dict(_CONFIG.value)
    folder, data, params = prepare(config)
    converted = convert(config, folder, data, params)
    report = write_report(config, folder, data, converted)
    print(summary_table(report))
    print(f"report, pictures and videos: {folder / 'report'}")


if __name__ == "__main__":
    command_line.run(
        main, required=["config"], config=_CONFIG,
        save_memory="lower the batch_size of the phase, or raise its accumulation",
    )  # fmt: skip
