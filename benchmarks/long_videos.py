"""What the models of a finished run keep over videos far longer than a training clip.

    PYTHONPATH=. python benchmarks/long_videos.py --run=runs/tiny-synthetic --set=sampler.steps=32 \
        --out=benchmarks/results/long_videos_tiny_cpu.json

The model goes on alone from the first third of held-out clips. What it draws is read block by
block: which share of the sprites in full sight are those that went in, which of those that come
back are as their lane showed them last, and whether any are in sight at all. With --true it sees
true videos instead, and is asked early and late what comes back: what is lost there, its memory has
lost.

Every call adds one entry to the file, or replaces the one of the same title; --frames draws some
frames of a rollout as a PNG file.
"""

import json
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging
from device_time import describe_device
from etils import epath
from study.clock import Clock
from study.plots import rollout_sheet
from study.recipes import changed, parse_changes
from study.rollouts import ask_along, roll_out

from arl2_jax.config import ConfigError
from arl2_jax.evaluation.gap import Model
from arl2_jax.generation.finished_run import read_run_config
from arl2_jax.storage import plain_json
from arl2_jax.weights.folder import load_params_folder

_RUN = flags.DEFINE_string("run", None, "Folder of the run.", required=True)
_MODEL = flags.DEFINE_enum("model", "stage2", ["teacher", "stage2"], "Which of its models.")
_TITLE = flags.DEFINE_string("title", None, "Name in the file; by default of run and model.")
_TRUE = flags.DEFINE_bool("true", False, "See true videos.")
_SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE of the configuration.")
_BLOCKS = flags.DEFINE_integer("blocks", 256, "Blocks; 60 at most for a softmax model.")
_VIDEOS = flags.DEFINE_integer("videos", 16, "Videos, all at once.")
_MINUTES = flags.DEFINE_float("minutes", None, "Time after which a rollout ends early.")
_OUT = flags.DEFINE_string("out", None, "JSON file to add the measures to.")
_FRAMES = flags.DEFINE_string("frames", None, "PNG file to draw frames of a rollout in.")
_COMMIT = flags.DEFINE_string("commit", None, "Commit to note.")
_TIMED = (
    "seconds_a_block: generation of a block of all videos together, with decoding and reading, "
    "after the first block, which compiles; seconds_stream: all that is done with true videos"
)


def main(_):
    """Makes one rollout or sees one set of true videos, prints what is kept and writes it."""
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
    model = Model(jax.tree.map(jax.numpy.asarray, load_params_folder(weights)[0]), cfg)
    title = _TITLE.value or " ".join([run.name, _MODEL.value, *_SET.value])
    if _TRUE.value:
        measures = ask_along(config, model, 0, _BLOCKS.value, _VIDEOS.value)
    else:
        found = roll_out(config, model, 0, clock, _BLOCKS.value, _VIDEOS.value)
        measures = found.measures
        if _FRAMES.value:
            Path(_FRAMES.value).write_bytes(rollout_sheet(**found.frames))
    print(_table(title, measures))
    if _OUT.value:
        facts = {
            "title": title, "model": _MODEL.value, "changes": _SET.value,
            "context_noise_trained": stored.sampler.context_noise, "commit": _COMMIT.value,
        }  # fmt: skip
        _add(Path(_OUT.value), title, facts | measures | describe_device())


def _table(title: str, measures: dict[str, Any]) -> str:
    """What is kept in each part of the videos, as text."""
    lines = [f"{title}: {measures['blocks']} blocks of {measures['videos']} videos"]
    percent = lambda share: "  -" if share is None else f"{100 * share:3.0f}"
    place = lambda part: "  blocks {:4} to {:4}: ".format(*(i + 1 for i in part["blocks"]))
    for part in measures.get("stream", ()):
        lines.append(
            f"{place(part)}{percent(part['recall'])} % of {part['count']:3} recalled, "
            f"{percent(part['other'])} % drawn as another"
        )
    for part in measures.get("drift", ()):
        lines.append(
            f"{place(part)}{100 * part['seen']:5.1f} % in sight, "
            f"{percent(part['right'])} % of {part['count']:4} right; of {part['same']['count']:3} "
            f"that come back {percent(part['returns']['right'])} % right, "
            f"{percent(part['same']['right'])} % as last seen"
        )
    return "\n".join(lines)


def _add(path: Path, title: str, entry: dict[str, Any]) -> None:
    """Put an entry into the file, in the place of one of its title."""
    content = json.loads(path.read_text()) if path.exists() else {"timed": _TIMED, "videos": []}
    others = [other for other in content["videos"] if other["title"] != title]
    content["videos"] = [*others, plain_json(entry)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    app.run(main)
