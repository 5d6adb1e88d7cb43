"""Files of a run of the study: its result, and weights small enough to copy."""

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from device_time import describe_device
from etils import epath
from flax import traverse_util

from arl2_jax.config import Config, ModelConfig, to_config_dict
from arl2_jax.json_trees import plain_json
from arl2_jax.models import Params, is_added, unstack_params
from arl2_jax.storage import write_whole
from arl2_jax.training.partition import split_params
from arl2_jax.weights.export import export_params

# Bytes of a file of weights; larger ones are split.
_SHARD = 15e6
# Smaller parameters, such as decays, keep all their digits.
_FEW = 4096


class Folder:
    """The study's folder: results by name, and weights of teachers and of students."""

    def __init__(self, path: str):
        self.path = Path(path)
        self.results, self.teachers = self.path / "results", self.path / "teachers"
        self.students, self.pictures = self.path / "students", self.path / "pictures"
        for folder in (self.results, self.teachers, self.students, self.pictures):
            folder.mkdir(parents=True, exist_ok=True)

    def result(self, name: str) -> Path:
        """The file of a run's result."""
        return self.results / f"{name}.json"

    def teacher(self, seed: int) -> Path:
        """The weights of a teacher, which `load_params` reads."""
        return self.teachers / f"t{seed}"

    def student(self, name: str) -> Path:
        """What a conversion has added to its teacher."""
        return self.students / f"{name}.npz"

    def scratch(self, name: str) -> Path:
        """What a run needs while it runs."""
        return self.path / "scratch" / name


def write_result(folder: Folder, name: str, config: Config, result: dict[str, Any]) -> None:
    """Write what a run has measured, with where it ran."""
    facts = {"name": name} | result | describe_device()
    facts |= {
        "commit": result.get("commit") or commit(),
        "written": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    facts |= {"shapes": shapes(config), "config": to_config_dict(config)}
    content = json.dumps(plain_json(facts), indent=1, allow_nan=False) + "\n"
    write_whole(epath.Path(folder.result(name)), content.encode())


def save_teacher(path: Path, params: Params, cfg: ModelConfig) -> None:
    """Write a softmax model in Wan's layout, its matrices in half precision."""
    export_params(
        path, jax.tree.map(_half, params), cfg, layout="wan", shard_size=_SHARD, overwrite=True
    )


def save_student(path: Path, params: Params) -> None:
    """Write what a hybrid adds to its teacher's weights."""
    added, _ = split_params(unstack_params(params), is_added)
    flat = traverse_util.flatten_dict(added, sep="/")
    unfinished = path.with_suffix(".unfinished.npz")
    np.savez(unfinished, **{name: _half(leaf) for name, leaf in flat.items()})
    unfinished.replace(path)


def load_student(path: Path) -> Params:
    """Read what `save_student` has written, in float32."""
    with np.load(path) as found:
        flat = {name: jnp.asarray(found[name], jnp.float32) for name in found.files}
    return traverse_util.unflatten_dict(flat, sep="/")


def loss_curve(folder: Path) -> list[dict[str, float]]:
    """Loss over the steps of a phase, from its logs."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: record[name] for name in ("step", "loss")} for record in records]


def _half(leaf: Any) -> np.ndarray:
    """Large parameters in float16, which has more digits than bfloat16 and range enough."""
    array = np.asarray(leaf, np.float32)
    return array.astype(np.float16) if array.size > _FEW else array


def shapes(config: Config) -> dict[str, Any]:
    """Sizes of a model and of its clips, for the record of a measurement."""
    model = config.model
    return {
        "tokens_per_block": model.frames_per_block * config.tokens_per_frame,
        "blocks": config.blocks,
        "dim": model.dim,
        "heads": model.num_heads,
        "head_dim": model.head_dim,
        "layers": model.num_layers,
        "hybrid_layers": list(model.hybrid_layers),
        "pixels": [config.data.height, config.data.width],
        "dtype": model.dtype,
    }


def commit() -> str | None:
    """The commit that this code is at; None outside its repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
