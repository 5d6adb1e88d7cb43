"""The report is complete, also for partial runs, and its pictures and videos can be opened."""

import dataclasses
import functools
import io
import json

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from arl2_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    SamplerConfig,
    SpriteConfig,
    to_config_dict,
)
from arl2_jax.data import open_data
from arl2_jax.evaluation import continuation, plots
from arl2_jax.evaluation.report import write_report
from arl2_jax.evaluation.table import summary_table
from arl2_jax.generation.video import write_video
from arl2_jax.models import init_memory, param_shapes, without_delta
from arl2_jax.training.pipeline import Converted

CONFIG = Config(
    ModelConfig.tiny(
        dim=32, ffn_dim=32, num_heads=2, num_layers=2, hybrid_layers=(0, 1), freq_dim=8,
        text_dim=8, text_len=4, in_dim=12, out_dim=12,
    ),
    SamplerConfig(timesteps=(1000.0, 500.0)),
    DataConfig(
        frames=12,
        height=12,
        width=32,
        codec_factor=2,
        held_out=8,
        sprites=SpriteConfig(size=5, speed=(3.0, 3.0), occluder_width=14, count=(2, 2)),
    ),
    evaluation=EvaluationConfig(clips=8, recall_clips=8, rollout_length=3),
)  # fmt: skip
SECONDS = {"teacher": 3.0, "stage1": 1.0, "stage2": 2.0, "control": 2.0, "control_local": 2.0}


MODELS = ("teacher", "student", "control", "control_local")


def write_metrics(folder):
    for phase in SECONDS:
        (folder / phase).mkdir(parents=True)
        lines = []
        for step in range(10, 60, 10):
            values = {"step": step, "loss": 1 / step, "layer_00/error": 0.1, "layer_01/error": None}
            values |= {f"layer_0{i}/{name}": 0.5 for i in range(2) for name in
                       ("gate_mean", "gated_memory_to_local")}  # fmt: skip
            lines.append(json.dumps(values) + "\n")
        (folder / phase / "metrics.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def params():
    """Five random models: at its initial values the network predicts zeros."""
    rng, shapes = np.random.default_rng(0), param_shapes(CONFIG.model)
    draw = functools.partial(rng.normal, 0.1, 0.2)
    return [jax.tree.map(lambda x: jnp.float32(draw(x.shape)), shapes) for _ in range(5)]


@pytest.fixture(scope="module")
def full(params, tmp_path_factory):
    """Report and folder of a run with everything."""
    folder = tmp_path_factory.mktemp("run")
    write_metrics(folder)
    seconds = {name: 1.0 for name in SECONDS}
    converted = Converted(*params, SECONDS, seconds)
    return write_report(CONFIG, folder, open_data(CONFIG), converted), folder / "report"


def assert_clean(found, folder):
    """What was returned is what was written, and nothing is unfinished."""

    def refuse(constant):
        raise ValueError(constant)

    text = (folder / "report.json").read_text()
    assert json.loads(text, parse_constant=refuse) == found
    assert not list(folder.glob("*.unfinished"))
    assert max(map(len, summary_table(found).splitlines())) <= 80


def read(path):
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_report_of_a_whole_run(full):
    found, folder = full
    assert_clean(found, folder)
    stages = ("untrained", "stage1", "stage2", "control", "control_local")
    for name in ("teacher_loss", "student_loss", *(f"error_{stage}" for stage in stages)):
        assert found[name] > 0
    assert found["memory_gap"] == 1 - found["error_stage2"] / found["error_control"]
    assert found["memory_gap_local"] == 1 - found["error_stage2"] / found["error_control_local"]
    assert found["gap_closed"] == 1 - found["error_stage2"] / found["error_untrained"]
    by_timestep = found["errors_by_timestep"]
    assert len(by_timestep.pop("timesteps")) == 2 and by_timestep.keys() == {
        "untrained", "stage1", "stage2", "control", "control_local",
    }  # fmt: skip
    for stage, errors in by_timestep.items():
        np.testing.assert_allclose(np.mean(errors), found[f"error_{stage}"], rtol=1e-6)
    assert found["seconds"] == SECONDS and found["compile_seconds"]["control"] == 1
    assert found["seconds_report"] > 0 and found["clips"] == 8
    assert found["config"] == json.loads(json.dumps(to_config_dict(CONFIG)))


def test_report_scores_recall(full):
    found = full[0]
    recall = found["recall"]
    assert recall["clips"] == 8 and recall["chance"] == 1 / 12 and found["recall_reason"] is None
    assert found["baseline"] >= 1 / 12
    for model in MODELS:
        assert recall[model].keys() == {"recall", "color", "shape", "interval"}
        low, high = recall[model].pop("interval")
        assert 0 <= low <= recall[model]["recall"] <= high <= 1
        by_lag = found["recall_by_lag"][model]
        assert sum(lag["clips"] for lag in by_lag.values()) == 8
        mean = sum(lag["clips"] * lag["recall"] for lag in by_lag.values()) / 8
        # The same float64 numbers, added in another order.
        np.testing.assert_allclose(mean, recall[model]["recall"], rtol=1e-12)


def test_report_exchanges_the_memories_that_a_model_has(full):
    """Both layers are hybrid: the student has no cache, and a control no memory at all."""
    has = {
        "teacher": {"none", "caches"},
        "student": {"none", "states", "zeroed"},
        "control": {"none"},
        "control_local": {"none"},
    }
    for model in MODELS:
        scores = full[0]["exchange"][model]
        carried = scores.pop("carried")
        assert carried.keys() == {"states", "caches"}
        assert {name for name, shares in scores.items() if shares} == has[model]
        assert set(scores) == {"none", "states", "caches", "zeroed"}
        for shares in filter(None, scores.values()):
            parts = [shares[name] for name in ("own", "twin", "other", "nothing")]
            np.testing.assert_allclose(sum(parts), 1, rtol=1e-12)
        assert scores["none"]["own"] == full[0]["recall"][model]["recall"]


def test_table_shows_what_was_exchanged(full):
    text = (full[1] / "report.json").read_text()
    table = summary_table(json.loads(text))
    for part in (
        "twin's states",
        "recall % by lag",
        "best blind answer",
        "memory gap",
        "control, local",
    ):
        assert part in table


def test_report_has_sizes_and_environment(full, params):
    found = full[0]
    sizes = [x.size for x in jax.tree.leaves(params[0])]
    assert sum(found["parameters"].values()) == sum(sizes) and found["parameters"]["added"] > 0
    memory = found["memory_bytes"]
    assert memory["frames"] == [12, 36]
    assert memory["teacher"][1] == 3 * memory["teacher"][0]
    state = init_memory(CONFIG.model, batch=1, frames=12, tokens_per_frame=24)
    assert memory["student"] == [sum(x.nbytes for x in jax.tree.leaves(state))] * 2
    assert found["versions"].keys() == {
        "python", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "arl2_jax",
    }  # fmt: skip
    assert found["versions"]["jax"] == jax.__version__
    assert found["device"]["platform"] == jax.default_backend() and found["device"]["count"] > 0


def test_videos_are_as_long_as_asked(full):
    videos = sorted(full[1].glob("*.mp4"))
    assert len(videos) == CONFIG.evaluation.rollout_clips
    for path in videos:
        frames = read(path)
        height, width, _ = frames[0].shape
        assert len(frames) == 36 and height % 2 == width % 2 == 0 and width > 2 * 384


def test_pictures_open(full):
    for name in ("curves.png", "contact_sheet.png", "recall_by_lag.png"):
        with Image.open(full[1] / name) as image:
            image.load()
            assert image.width > 600 and image.height > 400
            assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_true_continuations_of_sprites_begin_with_the_clip():
    latents = open_data(CONFIG).held_out(2)["latents"]
    truth = continuation.truth(CONFIG, open_data(CONFIG).codec, latents, 36)
    assert truth.shape == (2, 36, 12, 32, 3)
    decoded = open_data(CONFIG).codec.decode(latents)
    np.testing.assert_array_equal(truth[:, :12], continuation.to_uint8(decoded))


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_missing_stages_are_null(params, tmp_path, stages):
    phases = ("teacher", "stage1", "stage2")[: stages + 1]
    changes = {"recall_clips": 0, "controls": (), "rollout_clips": 0 if stages == 1 else 2}
    config = dataclasses.replace(
        CONFIG, phases=phases, evaluation=dataclasses.replace(CONFIG.evaluation, **changes)
    )
    trained = [*params[1 : 1 + stages], None, None, None, None][:4]
    found = write_report(
        config, tmp_path, open_data(config), Converted(params[0], *trained, {}, {})
    )
    assert_clean(found, tmp_path / "report")
    assert found["teacher_loss"] > 0 and found["error_untrained"] > 0
    given = [found[name] is not None for name in ("student_loss", "error_stage1", "error_stage2")]
    assert given == [stages > 0, stages > 0, stages > 1]
    assert (found["gap_closed"] is None) == (stages < 2)
    assert found["recall"] is found["exchange"] is found["baseline"] is None
    assert found["memory_gap"] is None and "recall_clips=0" in found["recall_reason"]
    files = {path.name for path in (tmp_path / "report").iterdir()}
    videos = {"contact_sheet.png", "continued_00.mp4", "continued_01.mp4"} if stages != 1 else set()
    assert files == {"report.json", "retention.png"} | videos
    names = ["untrained", "stage1", "student"] if stages else ["untrained"]
    assert list(found["retention"]) == names
    layers = len(CONFIG.model.hybrid_layers)
    assert all(len(found["retention"][name]["retention"]) == layers for name in names)


def test_a_teacher_without_hybrid_layers(params, tmp_path):
    evaluation = dataclasses.replace(CONFIG.evaluation, rollout_clips=0)
    config = dataclasses.replace(
        CONFIG, model=CONFIG.model.teacher(), phases=("teacher",), evaluation=evaluation
    )
    teacher = without_delta(params[0])
    converted = Converted(teacher, None, None, None, None, {}, {})
    found = write_report(config, tmp_path, open_data(config), converted)
    assert_clean(found, tmp_path / "report")
    assert found["recall"]["teacher"] and found["recall"]["student"] is None
    assert found["error_untrained"] is found["memory_bytes"]["student"] is None
    assert found["parameters"]["added"] == 0


def test_report_on_video_files(params, tmp_path):
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(40, 12, 32, 3), dtype=np.uint8)
    (tmp_path / "clips").mkdir()
    write_video(tmp_path / "clips" / "noise.mp4", frames, 8)
    data = dataclasses.replace(CONFIG.data, source="video", path=str(tmp_path / "clips"))
    config = dataclasses.replace(CONFIG, data=data)
    converted = Converted(*params[:3], None, None, {}, {})
    found = write_report(config, tmp_path, open_data(config), converted)
    assert_clean(found, tmp_path / "report")
    assert found["recall"] is None and "data.source=video" in found["recall_reason"]
    assert len(read(tmp_path / "report" / "continued_01.mp4")) == 36
    assert (tmp_path / "report" / "contact_sheet.png").exists()


def test_curves_of_many_layers_and_of_none(tmp_path):
    assert plots.curves(tmp_path, ("teacher",)) is None
    (tmp_path / "stage1").mkdir()
    lines = [
        {"step": step, "loss": None if step == 5 else 10 / step}
        | {f"layer_{i:02d}/error": (i + 1) / step for i in range(30)}
        for step in range(1, 300)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "stage1" / "metrics.jsonl").write_text(text)
    picture = plots.curves(tmp_path, ("teacher", "stage1"))
    assert picture is not None
    with Image.open(io.BytesIO(picture)) as image:
        image.load()


def test_contact_sheet_shows_frames_pixel_by_pixel():
    frames = np.random.default_rng(0).integers(256, size=(2, 5, 7, 3), dtype=np.uint8)
    rows = [plots.Row("a", frames), plots.Row("b", [None, frames[0]], ["own", "twin"], opens=True)]
    boxes = [(0, 0, 2, 2), (1, 1, 3, 3)]
    png = plots.contact_sheet(rows, ["x", "y"], title="t", boxes=boxes, width=70)
    with Image.open(io.BytesIO(png)) as image:
        picture = np.asarray(image.convert("RGB"))
    large = frames[1].repeat(10, axis=0).repeat(10, axis=1)
    starts = np.argwhere((picture == large[0, 0]).all(-1))
    assert any(np.array_equal(picture[y : y + 50, x : x + 70], large) for y, x in starts)
    for color, there in (("#1f9d55", False), ("#f08c00", True), ("#d43b3b", False)):
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (picture == rgb).all(-1).any() == there, "the first frame of row b is not drawn"
