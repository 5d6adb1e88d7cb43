import dataclasses
import json

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from data_sizes import make_data, tiny_model

from arl2_jax.config import Config, EvaluationConfig, ShortClipsConfig
from arl2_jax.data import LatentSource, LatentWriter, open_data, open_short_data
from arl2_jax.data.latents import LatentFolder, check_latents
from arl2_jax.data.manifest import sha256
from arl2_jax.errors import ConfigError, DataError

SHAPE, TEXT = (4, 6, 12, 48), (8, 32)


def make_config(path, held_out=3, **model):
    return Config(
        tiny_model(**model),
        data=make_data(source="latents", path=str(path), frames=4, held_out=held_out),
        evaluation=EvaluationConfig(clips=held_out),
    )


def make_clips(count):
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((count, *SHAPE)).astype(np.float32)
    text = rng.standard_normal((count, *TEXT)).astype(np.float32)
    for index in range(count):
        text[index, index % 9 :] = 0
    return latents, text


def make_writer(path, dtype="float32", **options):
    options = {"records_per_shard": 4, "codec": "space_to_depth"} | options
    return LatentWriter(path, SHAPE, TEXT, dtype, **options)


def write(path, count=10, dtype="float32", **options):
    latents, text = make_clips(count)
    with make_writer(path, dtype, **options) as writer:
        for clip in zip(latents, text, strict=True):
            writer.write(*clip)
    return latents, text


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 0), ("float16", 1e-3), ("bfloat16", 8e-3)]
)
def test_round_trip(tmp_path, dtype, error):
    latents, text = write(tmp_path, dtype=dtype, source={"kind": "made up"})
    source = LatentSource(make_config(tmp_path))
    assert len(source) == 7
    clips = [source.training(i, np.random.default_rng()) for i in range(7)]
    clips += [source.held_out(i) for i in range(3)]
    for clip, x, y in zip(clips, latents, text, strict=True):
        assert clip["latents"].dtype == clip["text"].dtype == np.float32
        np.testing.assert_allclose(clip["latents"], x, rtol=error, atol=error / 100)
        np.testing.assert_allclose(clip["text"], y, rtol=error, atol=error / 100)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [shard["count"] for shard in manifest["shards"]] == [4, 4, 2]
    assert manifest["source"] == {"kind": "made up"} and manifest["dtype"] == dtype


def test_batches_and_held_out(tmp_path):
    latents, _ = write(tmp_path)
    data = open_data(make_config(tmp_path))
    np.testing.assert_array_equal(data.held_out(3)["latents"], latents[7:])
    epochs = [
        e["latents"][:, 0, 0, 0, 0]
        for e, _ in zip(data.train_batches(7, 0), range(3), strict=False)
    ]
    for epoch in epochs:
        assert sorted(epoch) == sorted(latents[:7, 0, 0, 0, 0])
    assert len({tuple(epoch) for epoch in epochs}) == 3


def write_some(path, clips, stop, **options):
    """Write the missing clips, and stop before clip `stop`."""
    with make_writer(path, **options) as writer:
        for index in range(writer.count, len(clips[0])):
            if index == stop:
                raise RuntimeError
            writer.write(*(part[index] for part in clips))


def test_short_clips_are_the_first_frames(tmp_path):
    latents, _ = write(tmp_path)
    config = make_config(tmp_path)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, short=ShortClipsConfig(frames=2))
    )
    data = open_short_data(config, "stage2")
    assert data.config.blocks == 1 and data.config.stage2.batch_size == 2 * config.stage2.batch_size
    np.testing.assert_array_equal(data.held_out(3)["latents"], latents[7:, :2])
    batch = next(data.train_batches(7, 0))["latents"]
    order = [np.flatnonzero((latents[:, :2] == clip).all((1, 2, 3, 4)))[0] for clip in batch]
    assert sorted(order) == list(range(7))


def test_a_failed_run_leaves_no_manifest_and_no_half_shard(tmp_path):
    with pytest.raises(RuntimeError):
        write_some(tmp_path, make_clips(6), 3)
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        LatentSource(make_config(tmp_path))


def test_an_unfinished_folder_is_continued(tmp_path):
    clips, source = make_clips(10), {"source": {"seed": 3}}
    write(tmp_path / "whole", **source)
    folder = tmp_path / "parts"
    for stop in (3, 6, 9):
        with pytest.raises(RuntimeError):
            write_some(folder, clips, stop, resume=True, **source)
        (folder / "00002.tmp").write_bytes(b"half a shard")
    with pytest.raises(DataError, match=r"unfinished\.json is there: finish it"):
        LatentFolder(folder)
    with pytest.raises(FileExistsError, match="resume it or name another folder"):
        write_some(folder, clips, None, **source)
    for name, options in {"source": {}, "dtype": source | {"dtype": "float16"}}.items():
        with pytest.raises(ConfigError, match=f"started with other {name};") as error:
            write_some(folder, clips, None, resume=True, **options)
        assert "\n" not in str(error.value)
    write_some(folder, clips, None, resume=True, **source)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "whole").iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_damaged_unfinished_folder_is_not_continued(tmp_path):
    clips = make_clips(10)
    with pytest.raises(RuntimeError):
        write_some(tmp_path, clips, 6)
    (tmp_path / "00000.array_record").unlink()
    with pytest.raises(DataError, match=r"00000\.array_record is missing or of another size"):
        write_some(tmp_path, clips, None, resume=True)


def test_a_look_at_a_folder_describes_it(tmp_path):
    latents, text = write(tmp_path)
    check = check_latents(tmp_path)
    assert not check.problems and check.manifest.count == 10
    # The check adds in float64, numpy here in float32.
    np.testing.assert_allclose(check.mean, latents.mean((0, 1, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(check.std, latents.std((0, 1, 2, 3)), atol=1e-6)
    assert check.text_rows == np.mean([np.any(t, axis=-1).sum() for t in text])


def test_a_look_finds_every_damaged_file(tmp_path):
    write(tmp_path)
    flip(tmp_path / "00000.array_record", 0.5)
    (tmp_path / "00001.array_record").unlink()
    (tmp_path / "00002.array_record").write_bytes(b"")
    problems = check_latents(tmp_path).problems
    for problem, part in zip(problems, ("SHA-256", "is missing", "0 bytes instead"), strict=True):
        assert part in problem and "\n" not in problem


def test_a_look_finds_every_bad_clip_of_another_program(tmp_path):
    latents, text = make_clips(5)
    latents[1, 0, 0, 0, 0], text[2, 0, 3] = np.nan, np.inf
    records = [x.tobytes() + y.tobytes() for x, y in zip(latents, text, strict=True)]
    records[3] = records[3][:-4]
    file = tmp_path / "mine.array_record"
    writer = ArrayRecordWriter(str(file), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    shard = {"name": file.name, "count": 5, "bytes": file.stat().st_size, "sha256": sha256(file)}
    manifest = {
        "format": 2, "count": 5, "latent_shape": SHAPE, "text_shape": TEXT, "dtype": "float32",
        "codec": {"name": "wan_vae"}, "source": {}, "shards": [shard],
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    problems = check_latents(tmp_path).problems
    assert [p.split(":")[0] for p in problems[:2]] == ["clip 1", "clip 2"] and len(problems) == 3
    assert "latents" in problems[0] and "text" in problems[1] and "record 3" in problems[2]
    np.testing.assert_array_equal(LatentFolder(tmp_path)[4]["latents"], latents[4])


def test_latents_that_are_not_normalized_are_reported(tmp_path):
    with make_writer(tmp_path) as writer:
        writer.write(*(part[0] * 100 for part in make_clips(1)))
    assert any("root mean square" in problem for problem in check_latents(tmp_path).problems)


def test_writer_refuses_what_it_cannot_store(tmp_path):
    latents, text = make_clips(1)
    with LatentWriter(tmp_path, SHAPE, TEXT, "float16") as writer:
        with pytest.raises(ValueError, match="must have the shape"):
            writer.write(latents[0, :2], text[0])
        with pytest.raises(ValueError, match="not finite in float16"):
            writer.write(latents[0] * 1e6, text[0])
        writer.write(latents[0], text[0])
    with pytest.raises(FileExistsError, match="name another folder"):
        LatentWriter(tmp_path, SHAPE, TEXT)
    with pytest.raises(ValueError, match="dtype='int8'"):
        LatentWriter(tmp_path / "other", SHAPE, TEXT, "int8")


def edit(folder, **fields):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | fields))


def flip(path, share):
    content = bytearray(path.read_bytes())
    content[int(len(content) * share)] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "manifest.json").unlink(), r"manifest\.json is missing: looked for "),
        (lambda p: (p / "manifest.json").write_text("{"), r"manifest\.json .*is damaged"),
        (lambda p: (p / "manifest.json").write_text('{"format": 9}'), r"has format 9"),
        (lambda p: (p / "manifest.json").write_text('{"format": 2, "shards": [3]}'), r"is damaged"),
        (lambda p: edit(p, latent_shape=[4, 6, 12]), r"latent_shape=\(4, 6, 12\) must be 4"),
        (lambda p: edit(p, codec={}), r"must have a name"),
        (lambda p: edit(p, count=3), r"10 records, not 3"),
        (
            lambda p: (p / "00001.array_record").unlink(),
            r"00001\.array_record is missing, but manifest",
        ),
        (
            lambda p: (p / "00001.array_record").write_bytes(b"x" * 100),
            r"00001\.array_record .*damaged: 100 bytes instead of",
        ),
    ],
    ids=[
        "no_manifest",
        "half_manifest",
        "newer_manifest",
        "odd_manifest",
        "shape_of_no_clip",
        "no_codec",
        "wrong_count",
        "no_shard",
        "truncated_shard",
    ],
)
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage, message):
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        open_data(make_config(tmp_path))
    assert any(word in str(error.value) for word in ("LatentWriter", "write the folder"))
    assert "\n" not in str(error.value)


def test_missing_folder_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"looked for .*none/manifest\.json"):
        open_data(make_config(tmp_path / "none"))


def test_flipped_bits_are_found(tmp_path):
    write(tmp_path)
    flip(tmp_path / "00001.array_record", 0.3)
    with pytest.raises(DataError, match=r"00001\.array_record .*is damaged") as error:
        source = LatentSource(make_config(tmp_path))
        for index in range(10):
            source.folder[index]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dict(in_dim=64, out_dim=64), r"latent_shape=\(4, 6, 12, 48\).*\(4, 6, 12, 64\)"),
        (dict(text_len=9), r"text_shape=\(8, 32\).*model\.text_len.*\(9, 32\)"),
    ],
)
def test_other_shapes_are_refused(tmp_path, model, message):
    write(tmp_path)
    with pytest.raises(ConfigError, match=message):
        open_data(make_config(tmp_path, **model))


def test_nothing_left_for_training(tmp_path):
    write(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.held_out=10 leaves none of the 10 clips"):
        open_data(make_config(tmp_path, held_out=10))


def test_latents_of_another_codec_are_refused(tmp_path):
    write(tmp_path, codec="wan_vae", codec_weights="0123")
    with pytest.raises(ConfigError, match=r"codec wan_vae, but data\.codec=space_to_depth"):
        open_data(make_config(tmp_path))
