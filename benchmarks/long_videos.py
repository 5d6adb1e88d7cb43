"""What the models of a finished run keep over videos far longer than a training clip.

    PYTHONPATH=. python benchmarks/long_videos.py --run=runs/tiny-synthetic --set=sampler.steps=32 \
        --out=benchmarks/results/long_videos_tiny_cpu.json

The model continues the first third of held-out clips. Its drawings are read block by block: how
many sprites are fully visible, how many of these are those of the past, and how many of those that
come back look as their lane showed them last.

With --true it gets true videos instead, and draws the sprites that come back early and late in
them: errors there are not due to its own earlier drawings.

Every call adds one entry to the file, or replaces the one of the same title; --frames draws some
frames of a rollout as a PNG file.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from device_time import describe_device
from etils import epath
from study.clock import Clock
from study.plots import rollout_sheet
from study.recipes import changed, parse_changes
from study.rollouts import measure_long_recall, roll_out
from study.stored import commit, shapes

from arl2_jax.config import Config
from arl2_jax.errors import ConfigError, UserError
from arl2_jax.evaluation.gap import Model
from arl2_jax.generation.finished_run import read_run_config
from arl2_jax.json_trees import plain_json
from arl2_jax.weights.folder import load_params_folder

_RUN = flags.DEFINE_string("run", None, "Folder of the run.", required=True)
_MODEL = flags.DEFINE_enum("model", "stage2", ["teacher", "stage2"], "Which of its models.")
_TITLE = flags.DEFINE_string("title", None, "Name in the file; by default of run and model.")
_TRUE = flags.DEFINE_bool("true", False, "Give the model true videos.")
_SET = flags.DEFINE_multi_string("set", [], "sampler.FIELD=VALUE, may be repeated.")
_BLOCKS = flags.DEFINE_integer("blocks", 256, "Blocks; a softmax model ends at 60.", lower_bound=2)
_VIDEOS = flags.DEFINE_integer("videos", 16, "Videos, all at once.", lower_bound=1)
_MINUTES = flags.DEFINE_float("minutes", None, "Time after which a rollout ends early.")
_OUT = flags.DEFINE_string("out", None, "JSON file to add the measures to.")
_FRAMES = flags.DEFINE_string("frames", None, "PNG file to draw frames of a rollout in.")
_COMMIT = flags.DEFINE_string("commit", None, "Commit to note where there is no repository.")
_TIMED = (
    "seconds_a_block: generation of a block of all videos together, with decoding and reading, "
    "after the first block, which compiles; seconds_long_recall: all that is done with true videos"
)


def main(_):
    """Measure the model in one set of long videos, print what is kept and write it."""
    logging.set_verbosity(logging.INFO)
    try:
        config, model = _open()
    except UserError as error:
        raise SystemExit(f"error: {error}") from None
    # Each entry has its title, so the title includes the settings.
    asked = ["true videos"] if _TRUE.value else []
    name = epath.Path(_RUN.value).name
    title = _TITLE.value or " ".join([name, _MODEL.value, *asked, *_SET.value])
    if _TRUE.value:
        measures = measure_long_recall(config, model, 0, _BLOCKS.value, _VIDEOS.value)
    else:
        found = roll_out(config, model, 0, Clock(_MINUTES.value), _BLOCKS.value, _VIDEOS.value)
        measures = found.measures
        if _FRAMES.value:
            Path(_FRAMES.value).write_bytes(rollout_sheet(**found.frames))
    print(_table(title, measures))
    if _OUT.value:
        facts = {
            "title": title,
            "model": _MODEL.value,
            "changes": _SET.value,
            "shapes": shapes(dataclasses.replace(config, model=model.cfg)),
            "commit": _COMMIT.value or commit(),
        }
        _add(Path(_OUT.value), title, facts | measures | describe_device())


def _open() -> tuple[Config, Model]:
    """The configuration with its changes, and the model.

    Raises:
      ConfigError: before anything is read or compiled.
    """
    for name in ("frames", "minutes"):
        if _TRUE.value and flags.FLAGS[name].value is not None:
            raise ConfigError(f"{name}={flags.FLAGS[name].value} is for rollouts; leave out --true")
    changes = parse_changes(_SET.value)
    # All else belongs to the weights or to the clips they were trained on.
    if other := [name for name in changes if not name.startswith("sampler.")]:
        raise ConfigError(f"set={other[0]} is not a field of the sampler; leave it out")
    run = epath.Path(_RUN.value)
    config = changed(read_run_config(run), changes)
    if config.data.source != "synthetic":
        raise ConfigError(
            f"run={run} has data.source={config.data.source}, which has no ground truth of "
            "hidden objects; name a run on sprites"
        )
    if config.data.sprites.vertical:
        raise ConfigError(
            f"run={run} has data.sprites.vertical=True, and such sprites have no lanes to read; "
            "name another run"
        )
    weights = run / _MODEL.value / "weights"
    if not (run / _MODEL.value / "summary.json").exists():
        raise ConfigError(f"run={run} has no finished {_MODEL.value}; name another run or --model")
    cfg = config.model.teacher() if _MODEL.value == "teacher" else config.model
    return config, Model(jax.tree.map(jnp.asarray, load_params_folder(weights)[0]), cfg)


def _table(title: str, measures: dict[str, Any]) -> str:
    """What is kept in each part of the videos, as text."""
    lines = [f"{title}: {measures['blocks']} blocks of {measures['videos']} videos"]
    percent = lambda share: "  -" if share is None else f"{100 * share:3.0f}"
    place = lambda part: "  blocks {:4} to {:4}: ".format(*(i + 1 for i in part["blocks"]))
    for part in measures.get("long_recall", ()):
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
