"""How long the models of a finished run draw what they were given, with other samplers too.

    PYTHONPATH=. python benchmarks/rollout_drift.py --run=runs/tiny --model=stage2 \
        --set=sampler.steps=32 --out=benchmarks/results/rollout_drift_tiny_cpu.json

The model goes on alone from the first third of held-out clips. What it draws is read block by
block: which share of the sprites in full sight are those that went in, and whether any are in sight
at all. Every call adds one rollout to the file, or replaces the one of the same title; --frames
draws some of its frames as a PNG file.
"""

import json
from pathlib import Path

import jax
from absl import app, flags, logging
from device_time import describe_device
from etils import epath
from study.clock import Clock
from study.plots import rollout_sheet
from study.recipes import changed, parse_changes
from study.rollouts import roll_out

from arl2_jax.config import ConfigError
from arl2_jax.evaluation.gap import Model
from arl2_jax.generation.finished_run import read_run_config
from arl2_jax.storage import plain_json
from arl2_jax.weights.folder import load_params_folder

_RUN = flags.DEFINE_string("run", None, "Folder of the run.", required=True)
_MODEL = flags.DEFINE_enum("model", "stage2", ["teacher", "stage2"], "Which of its models.")
_TITLE = flags.DEFINE_string("title", None, "Name in the file; by default of run and model.")
_SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE of the configuration.")
_BLOCKS = flags.DEFINE_integer("blocks", 256, "Blocks; 60 at most for a softmax model.")
_VIDEOS = flags.DEFINE_integer("videos", 16, "Videos, generated together.")
_MINUTES = flags.DEFINE_float("minutes", None, "Time after which the rollout ends early.")
_OUT = flags.DEFINE_string("out", None, "JSON file to add the rollout to.")
_FRAMES = flags.DEFINE_string("frames", None, "PNG file to draw frames in.")
_COMMIT = flags.DEFINE_string("commit", None, "Commit to note.")
_TIMED = (
    "seconds_a_block: generation of a block of all videos together, with decoding and reading, "
    "after the first block, which compiles"
)


def main(_):
    """Makes one rollout, prints its drift and writes it."""
    logging.set_verbosity(logging.INFO)
    clock, run = Clock(_MINUTES.value), epath.Path(_RUN.value)
    try:
        stored = read_run_config(run)
        config = changed(stored, parse_changes(_SET.value))
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    weights = run / _MODEL.value / "weights"
    if not weights.exists():
        raise SystemExit(f"error: run={run} has no {weights}; name a run that has finished it")
    cfg = config.model.teacher() if _MODEL.value == "teacher" else config.model
    params = jax.tree.map(jax.numpy.asarray, load_params_folder(weights)[0])
    found = roll_out(config, Model(params, cfg), 0, clock, _BLOCKS.value, _VIDEOS.value)
    title = _TITLE.value or f"{run.name} {_MODEL.value} {' '.join(_SET.value)}".strip()
    print(_table(title, found.measures))
    if _FRAMES.value:
        Path(_FRAMES.value).write_bytes(rollout_sheet(**found.frames))
    if _OUT.value:
        facts = {
            "title": title, "model": _MODEL.value, "context_noise_trained":
            stored.sampler.context_noise, "changes": _SET.value, "commit": _COMMIT.value,
        }  # fmt: skip
        _add(Path(_OUT.value), title, facts | found.measures | describe_device())


def _table(title: str, measures: dict) -> str:
    """Drift by part of the rollout, as text."""
    lines = [f"{title}: {measures['blocks']} blocks of {measures['videos']} videos"]
    percent = lambda share: "  -" if share is None else f"{100 * share:3.0f}"
    for part in measures["drift"]:
        first, last = part["blocks"]
        lines.append(
            f"  blocks {first + 1:4} to {last + 1:4}: {100 * part['seen']:5.1f} % in sight, "
            f"{percent(part['right'])} % of {part['count']:4} right; of those that come back "
            f"{percent(part['returns']['right'])} % of {part['returns']['count']}"
        )
    return "\n".join(lines)


def _add(path: Path, title: str, rollout: dict) -> None:
    """Put a rollout into the file, in the place of one of its title."""
    content = json.loads(path.read_text()) if path.exists() else {"timed": _TIMED, "rollouts": []}
    others = [other for other in content["rollouts"] if other["title"] != title]
    content["rollouts"] = [*others, plain_json(rollout)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    app.run(main)
