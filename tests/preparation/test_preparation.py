"""Videos and rollouts become stored latents, and a run trains on them."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from one_line import assert_one_line
from tiny_release import MODEL, write_release

from arl2_jax import preparation
from arl2_jax.codecs import load_wan_codec
from arl2_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    SamplerConfig,
    Stage1Config,
    Stage2Config,
    TeacherConfig,
    TrainConfig,
)
from arl2_jax.data import open_data
from arl2_jax.data.latents import LatentFolder
from arl2_jax.errors import ConfigError, DataError, StorageError, UserError, WeightsError
from arl2_jax.generation.release_paths import ReleasePaths
from arl2_jax.generation.released import Resolution
from arl2_jax.generation.video import write_video
from arl2_jax.models import layer_of
from arl2_jax.preparation import rollouts, videos
from arl2_jax.training.pipeline import convert, prepare

ROOT = Path(__file__).parents[2]
RESOLUTION, FRAMES = Resolution(16, 32), 2
SAMPLER = SamplerConfig(timesteps=(1000.0, 500.0))
STORED = {"dtype": "float32", "records_per_shard": 2}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return str(write_release(tmp_path_factory.mktemp("release")))


@pytest.fixture(scope="module")
def paths(release):
    return ReleasePaths().within(release)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two videos of a square that moves; the second has a caption file."""
    folder = tmp_path_factory.mktemp("videos")
    for name, count in (("red_sprite", 27), ("b", 12)):
        frames = np.full((count, 16, 32, 3), 40, np.uint8)
        for t in range(count):
            frames[t, 4:10, t : t + 6] = (200, 60, 90)
        write_video(folder / f"{name}.mp4", frames, 16.0)
    (folder / "b.txt").write_text("two  blue\nsprites")
    return folder


def store_videos(clips, out, paths, **options):
    fixed = dict(frames=FRAMES, resolution=RESOLUTION, fps=16.0, text_len=MODEL.text_len) | STORED
    return preparation.store_videos(clips, out, paths, **(fixed | options))


def store_rollouts(prompts, out, release, paths, **options):
    fixed = dict(
        weights=release, sampler=SAMPLER, frames=FRAMES, resolution=RESOLUTION, frames_per_block=1
    )
    fixed |= STORED
    return preparation.store_rollouts(prompts, out, paths, **(fixed | options))


@pytest.fixture(scope="module")
def stored(clips, paths, tmp_path_factory):
    out = tmp_path_factory.mktemp("stored") / "latents"
    assert store_videos(clips, out, paths) == 7
    return out


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_videos_are_cut_encoded_and_captioned(stored, clips, paths, release):
    folder = LatentFolder(stored)
    # 12 frames give two clips of 5, 27 give five; "b" comes first.
    assert len(folder) == 7 and folder.manifest.latent_shape == (2, 2, 4, MODEL.in_dim)
    codec = load_wan_codec(release)
    size = RESOLUTION.height, RESOLUTION.width
    [first, second] = videos.index_videos(clips, 16.0, 5)
    assert first.caption == "two blue sprites" and second.caption == "red sprite"
    pixels = videos.decode_frames(second.path, second.times[5:10], size)
    wanted = codec.encode(pixels[None].astype(np.float32) / 127.5 - 1)[0]
    np.testing.assert_array_equal(folder[3]["latents"], wanted)
    for index, caption in ((1, "two blue sprites"), (6, "red sprite")):
        [text] = paths.open_text_encoder().encode([caption], MODEL.text_len)
        np.testing.assert_array_equal(folder[index]["text"], text)
        assert not text[len(caption.split()) + 1 :].any()


def test_a_description_says_what_is_there(stored):
    text = preparation.describe(stored)
    assert "7 clips in 4 shards" in text and "2x2x4x4 float32, codec wan_vae" in text


def test_a_description_of_a_damaged_folder_is_an_error(clips, paths, tmp_path):
    store_videos(clips, tmp_path / "out", paths)
    shard = tmp_path / "out" / "00001.array_record"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    with pytest.raises(DataError, match="faults") as error:
        preparation.describe(tmp_path / "out")
    assert "00001.array_record is damaged: its SHA-256" in str(error.value)


class InterruptedHereError(Exception):
    pass


def interrupt(monkeypatch, module, name, after):
    """Makes a function raise at its call number `after`."""
    real, calls = getattr(module, name), []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) > after:
            raise InterruptedHereError
        return real(*args, **options)

    monkeypatch.setattr(module, name, counted)


def test_an_interrupted_folder_of_videos_is_continued(stored, clips, paths, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, videos, "decode_frames", 5)
        with pytest.raises(InterruptedHereError):
            store_videos(clips, tmp_path, paths)
    assert set(files(tmp_path)) == {"unfinished.json", "00000.array_record", "00001.array_record"}
    with pytest.raises(ConfigError, match="started with other") as error:
        store_videos(clips, tmp_path, paths, frames=3)
    assert_one_line(error, tmp_path, "latent_shape")
    assert store_videos(clips, tmp_path, paths) == 7
    assert files(tmp_path) == files(stored)
    with pytest.raises(StorageError, match="holds stored latents already") as error:
        store_videos(clips, tmp_path, paths)
    assert_one_line(error, f"out={tmp_path}", "name another folder")


def test_other_encoders_do_not_continue(clips, paths, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, videos, "decode_frames", 3)
        with pytest.raises(InterruptedHereError):
            store_videos(clips, tmp_path / "out", paths)
    other = ReleasePaths().within(str(write_release(tmp_path / "other", seed=9)))
    for changes, field in (
        ({"vae": other.vae}, "codec"),
        ({"text_encoder": other.text_encoder}, "source"),
    ):
        with pytest.raises(ConfigError, match=f"started with other {field};") as error:
            store_videos(clips, tmp_path / "out", dataclasses.replace(paths, **changes))
        assert_one_line(error, "unfinished.json")


def test_rollouts_depend_only_on_prompt_index_and_seed(release, paths, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red sprite\n\n two blue sprites \none corgi on navy\n")
    assert store_rollouts(prompts, tmp_path / "whole", release, paths) == 3
    with monkeypatch.context() as patch:
        interrupt(patch, rollouts, "_roll_out", 2)
        with pytest.raises(InterruptedHereError):
            store_rollouts(prompts, tmp_path / "parts", release, paths)
    store_rollouts(prompts, tmp_path / "parts", release, paths)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    folder = LatentFolder(tmp_path / "whole")
    [text] = paths.open_text_encoder().encode(["two blue sprites"], MODEL.text_len)
    np.testing.assert_array_equal(folder[1]["text"], text)
    assert np.abs(folder[0]["latents"] - folder[1]["latents"]).max() > 0.1
    store_rollouts(prompts, tmp_path / "seed", release, paths, seed=1)
    assert np.abs(LatentFolder(tmp_path / "seed")[1]["latents"] - folder[1]["latents"]).max() > 0.1


def test_rollouts_are_guided_away_from_the_negative_prompt(release, paths, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red sprite\n")
    sampler, made = SamplerConfig(method="euler", steps=2, guidance=4.0), []
    for negative in ("", "two blue corgi"):
        out = tmp_path / f"out{len(negative)}"
        options = {"sampler": sampler, "negative_prompt": negative}
        store_rollouts(tmp_path / "prompts.txt", out, release, paths, **options)
        made.append(LatentFolder(out)[0]["latents"])
    assert np.abs(made[0] - made[1]).max() > 1e-2


def test_what_cannot_be_stored_is_one_line(release, paths, clips, tmp_path, monkeypatch):
    good, long, none = (tmp_path / name for name in ("good.txt", "long.txt", "none.txt"))
    good.write_text("a red sprite\n")
    long.write_text("a red sprite\n" + "corgi " * 2000)
    none.write_text("\n \n")
    monkeypatch.setattr(rollouts, "Generator", None)
    out = tmp_path / "out"
    for prompts, options, parts in (
        (tmp_path / "no.txt", {}, ["no.txt cannot be read"]),
        (none, {}, ["has no prompt"]),
        (long, {}, ["8"]),
        (good, {"frames": 0}, ["frames=0"]),
        (good, {"weights": None}, ["weights is missing"]),
        (good, {"resolution": Resolution(20, 32)}, ["height=20", "16"]),
        (good, {"records_per_shard": 0}, ["records_per_shard=0"]),
    ):
        with pytest.raises(UserError) as error:
            store_rollouts(prompts, out, *(options.pop("weights", release), paths), **options)
        assert_one_line(error, *parts)
    for options, parts in (
        ({"resolution": Resolution(16, 33)}, ["width=33"]),
        ({"frames": 100}, ["none of its 2 video files"]),
        ({"out": None}, ["out is missing"]),
        ({"paths": dataclasses.replace(paths, vae=None)}, ["vae is missing"]),
        ({"paths": dataclasses.replace(paths, tokenizer=None)}, ["tokenizer is missing"]),
    ):
        arguments = {"out": out, "paths": paths} | options
        with pytest.raises(UserError) as error:
            store_videos(clips, **arguments)
        assert_one_line(error, *parts)
    assert not out.exists()


def test_a_text_encoder_of_another_width_is_one_line(release, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red sprite\n")
    monkeypatch.setattr(rollouts, "Generator", None)
    narrow = dataclasses.replace(MODEL, text_dim=16)
    other = str(write_release(tmp_path / "other", narrow))
    with pytest.raises(WeightsError, match="width 32") as error:
        store_rollouts(tmp_path / "prompts.txt", tmp_path / "out", other, ReleasePaths())
    assert_one_line(error, "text_dim=16")
    assert not (tmp_path / "out").exists()


def test_latents_that_are_not_finite_are_not_stored(release, paths, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a red sprite\n")
    real = rollouts._roll_out
    monkeypatch.setattr(rollouts, "_roll_out", lambda *a: real(*a) * np.nan)
    with pytest.raises(DataError, match="not finite") as error:
        store_rollouts(tmp_path / "prompts.txt", tmp_path / "out", release, paths)
    assert_one_line(error, "clip 0", "a red sprite")
    assert not list((tmp_path / "out").iterdir())


def make_config(stored, vae, workdir):
    phase = dict(steps=2, batch_size=8, warmup=1)
    return Config(
        dataclasses.replace(MODEL, hybrid_layers=(0,)),
        SAMPLER,
        DataConfig(
            source="latents", path=str(stored), frames=FRAMES, height=16, width=32, held_out=2,
            codec="wan_vae", codec_factor=8, vae=vae, fps=16.0,
        ),
        phases=("stage2",),
        teacher=TeacherConfig(weights=f"{vae}/transformer"),
        stage1=Stage1Config(**phase),
        stage2=Stage2Config(**phase),
        train=TrainConfig(workdir=str(workdir)),
        evaluation=EvaluationConfig(clips=2, recall_clips=0, controls=(), rollout_clips=1),
    )  # fmt: skip


def test_a_run_trains_on_stored_latents(stored, release, tmp_path):
    """The report, its pictures too, is looked at where the commands themselves run."""
    config = make_config(stored, release, tmp_path / "run")
    converted = convert(config, *prepare(config))
    untrained, trained = (layer_of(x, 0) for x in (converted.untrained, converted.stage2))
    moved = jax.tree.map(lambda x, y: float(abs(x - y).max()), untrained, trained)
    assert np.isfinite(jax.tree.leaves(moved)).all()
    assert max(jax.tree.leaves(moved["delta"])) > 0 == max(jax.tree.leaves(moved["self_attn"]))


def test_latents_of_another_vae_or_shape_are_refused(stored, release, tmp_path):
    config = make_config(stored, release, tmp_path / "run")
    other = str(write_release(tmp_path / "other", seed=9))
    for changes, parts in (
        ({"vae": other}, ["other weights of the VAE", other]),
        ({"height": 32}, ["latent_shape=(2, 2, 4, 4)", "data.height"]),
        ({"frames": 3}, ["latent_shape=(2, 2, 4, 4)", "data.frames"]),
        ({"codec_factor": 4}, ["data.codec_factor=4 must be 8"]),
        ({"codec": "space_to_depth", "codec_factor": 8, "vae": ""}, ["model.in_dim"]),
    ):
        data = dataclasses.replace(config.data, **changes)
        with pytest.raises(UserError) as error:
            open_data(dataclasses.replace(config, data=data))
        assert_one_line(error, *parts)


def test_without_the_vae_a_run_has_no_pictures(stored, tmp_path):
    config = make_config(stored, "", tmp_path / "run")
    assert open_data(config).codec is None


def run(*arguments):
    """Starts a command on one device, with XLA's other flags as they are here."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": " ".join(flags)},
    )


@pytest.mark.slow
def test_a_killed_command_is_continued_and_trains(release, clips, stored, tmp_path):
    """The commands themselves: prepare_data, killed with no warning, and again; train; then the
    model out, in again, and to work."""
    out = tmp_path / "latents"
    command = [
        ROOT / "launch" / "prepare_data.py", f"--videos={clips}", f"--release={release}",
        f"--out={out}", "--latent_frames=2", "--height=16", "--width=32", "--text_len=8",
        "--dtype=float32", "--records_per_shard=2", "--cache=",
    ]  # fmt: skip
    killed = run(*command)
    while not (out / "00000.array_record").exists() and killed.poll() is None:
        time.sleep(0.002)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    again = run(*command)
    assert "7 clips" in again.communicate()[0] and again.returncode == 0
    assert files(out) == files(stored)
    checked = run(ROOT / "launch" / "prepare_data.py", f"--check={out}")
    assert "good" in checked.communicate()[0] and checked.returncode == 0
    model = "dim=24 ffn_dim=32 num_heads=2 num_layers=2 freq_dim=8 text_dim=32 text_len=8 in_dim=4 "
    model += "out_dim=4 frames_per_block=1 hybrid_layers=(0,)"
    data = f"source=latents path={out} codec=wan_vae codec_factor=8 vae={release} frames=2 "
    data += "height=16 width=32 held_out=2 fps=16.0"
    trained = run(
        ROOT / "launch" / "train.py",
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        *(f"--config.model.{field}" for field in model.split()),
        *(f"--config.data.{field}" for field in data.split()),
        f"--config.teacher.weights={release}/transformer",
        f"--config.train.workdir={tmp_path / 'run'}",
        "--config.phases=('stage1', 'stage2')",
        *(
            f"--config.{phase}.{field}=2"
            for phase in ("stage1", "stage2")
            for field in ("steps", "batch_size")
        ),
        "--config.evaluation.clips=2",
        "--config.evaluation.controls=()",
    )
    output, errors = trained.communicate()
    assert trained.returncode == 0, errors
    report = tmp_path / "run" / "report"
    assert (report / "report.json").exists() and "converted" in output
    assert (report / "continued_00.mp4").exists() and (report / "contact_sheet.png").exists()

    def launch(name, *arguments):
        done = run(ROOT / "launch" / f"{name}.py", *arguments)
        output, errors = done.communicate()
        assert done.returncode == 0, errors
        return output

    launch(
        "export_weights",
        "--extras=write",
        f"--run={tmp_path / 'run'}",
        f"--out={tmp_path / 'arl2'}",
    )
    printed = launch(
        "import_weights", f"--weights={tmp_path / 'arl2'}", f"--out={tmp_path / 'own'}"
    )
    assert "layout      ARL2" in printed
    shown = [f"--release={release}", "--prompt=a red sprite", "--frames=5", "--cache="]
    model = {
        "run": [f"--run={tmp_path / 'run'}"],
        "own": [f"--weights={tmp_path / 'own'}", "--height=16", "--width=32"],
        "arl2": [f"--weights={tmp_path / 'arl2'}", "--height=16", "--width=32"],
    }
    for name, flags in model.items():
        sampler = [] if name == "run" else ["--method=euler", "--steps=8", "--shift=8"]
        launch("generate", *flags, *shown, *sampler, f"--out={tmp_path / f'{name}.mp4'}")
    videos = [(tmp_path / f"{name}.mp4").read_bytes() for name in model]
    assert videos[0] == videos[1] == videos[2]
