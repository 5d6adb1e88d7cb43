"""A finished run generates videos, and errors are one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import jax
import numpy as np
import pytest

from arl2_jax.config import Config, DataConfig, ModelConfig, SamplerConfig
from arl2_jax.config import to_config_dict as as_dict
from arl2_jax.errors import UserError
from arl2_jax.generation import make_video as making
from arl2_jax.generation.finished_run import write_from_run
from arl2_jax.generation.release_paths import ReleasePaths
from arl2_jax.generation.video import write_video
from arl2_jax.models import param_shapes, without_delta
from arl2_jax.weights.folder import save_params

ROOT = Path(__file__).parents[2]
CONFIG = Config(
    ModelConfig.tiny(
        dim=32, ffn_dim=32, num_heads=2, num_layers=2, hybrid_layers=(0, 1), freq_dim=8,
        text_dim=8, text_len=4, lora_rank=2,
    ),
    SamplerConfig(timesteps=(1000.0,)),
    DataConfig(height=12, width=16, frames=8),
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    draw = lambda x: 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    params = jax.tree.map(draw, param_shapes(CONFIG.model))
    (folder / "config.json").write_text(json.dumps(as_dict(CONFIG)))
    for name, tree in (("teacher", without_delta(params)), ("stage2", params)):
        save_params(folder / name / "weights", tree, as_dict(CONFIG.model))
        (folder / name / "summary.json").write_text("{}")
    return folder


def write_generated(run, model, **options):
    write_from_run(run, model, paths=ReleasePaths(), **options)


def read_video(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_video_has_the_frames_asked_for(run, tmp_path):
    write_generated(run, "stage2", prompt="a b", frames=6, out=tmp_path / "new" / "video.mp4")
    frames = read_video(tmp_path / "new" / "video.mp4")
    assert len(frames) == 6 and frames[0].shape[:2] == (288, 384)


def test_leak_is_that_of_the_call(run, tmp_path, monkeypatch):
    found = []

    def generator(cfg, *args, **options):
        found.append(cfg.delta.leak)
        raise InterruptedError

    monkeypatch.setattr(making, "Generator", generator)
    for leak in (None, 0.25):
        with pytest.raises(InterruptedError):
            out = tmp_path / "video.mp4"
            write_generated(run, "stage2", prompt="", frames=2, out=out, leak=leak)
    assert found == [0.0, 0.25]


def test_condition_comes_first_and_is_continued(run, tmp_path):
    pixels = np.full((12, 24, 32, 3), 30, np.uint8)
    pixels[:, :, 16:] = 200
    write_video(tmp_path / "clip.mp4", pixels, CONFIG.data.fps)
    out = tmp_path / "video.mp4"
    write_generated(
        run, "teacher", prompt="", frames=2, out=out, condition=str(tmp_path / "clip.mp4")
    )
    frames = read_video(out)
    assert len(frames) == 4 + 2
    assert abs(frames[3][100, 20].astype(int) - 30).max() < 10
    assert abs(frames[3][100, -20].astype(int) - 200).max() < 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "missing"}, "config.json is missing"),
        ({"model": "control"}, "no finished model 'control'; it has teacher, stage2"),
        ({"model": "control_local"}, "no finished model 'control_local'; it has teacher"),
        ({"frames": 7}, "frames=7 must be whole blocks: 6 or 8"),
        ({"frames": 0}, "frames=0 must be whole blocks: 2"),
        ({"out": "."}, "it is a folder|Is a directory"),
        ({"out": "file/video.mp4"}, "out=file/video.mp4 cannot be written"),
        ({"model": "teacher", "leak": 0.1}, "leak=0.1 has no effect: no layer"),
        ({"leak": 1.0}, r"model.delta.leak=1.0 must be a share in \[0, 1\)"),
        ({"condition": "missing.mp4"}, "there is no video file missing.mp4"),
        ({"condition": "file"}, "file cannot be decoded"),
        ({"condition": "short.mp4"}, "short.mp4 has 2 frames at 8 fps, fewer than the 4"),
    ],
)
def test_errors_come_before_compilation(run, changes, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(making, "Generator", None)
    Path("file").write_text("no video")
    write_video("short.mp4", np.zeros((2, 12, 16, 3), np.uint8), 8.0)
    options = {"run": run, "model": "stage2", "prompt": "", "frames": 4, "out": "x.mp4"} | changes
    with pytest.raises(UserError, match=message) as caught:
        write_generated(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--run=x", "--colour=red"],
        ["--run=x", "--frames=many"],
        ["--run=x", "more"],
        ["--run=x", "--weights=y"],
        ["--weights=x", "--timesteps=high"],
        ["--weights=x", "--vae_tile=3"],
        [],
    ],
)
def test_wrong_flags_are_one_line(arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "generate.py", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
