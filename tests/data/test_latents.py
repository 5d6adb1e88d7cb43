import json

import numpy as np
import pytest
from data_sizes import make_data, tiny_model

from arl2_jax.config import Config, ConfigError, EvaluationConfig
from arl2_jax.data import LatentSource, LatentWriter, open_data

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


def write(path, count=10, dtype="float32", **options):
    latents, text = make_clips(count)
    with LatentWriter(path, SHAPE, TEXT, dtype, records_per_shard=4, **options) as writer:
        for clip in zip(latents, text, strict=True):
            writer.write(*clip)
    return latents, text


@pytest.mark.parametrize(
    ("dtype", "error"), [("float32", 0), ("float16", 1e-3), ("bfloat16", 8e-3)]
)
def test_round_trip(tmp_path, dtype, error):
    latents, text = write(tmp_path, dtype=dtype, source="made up")
    source = LatentSource(make_config(tmp_path))
    assert len(source) == 7
    clips = [source.training(i, np.random.default_rng()) for i in range(7)]
    clips += [source.held_out(i) for i in range(3)]
    for clip, x, y in zip(clips, latents, text, strict=True):
        assert clip["latents"].dtype == clip["text"].dtype == np.float32
        np.testing.assert_allclose(clip["latents"], x, rtol=error, atol=error / 100)
        np.testing.assert_allclose(clip["text"], y, rtol=error, atol=error / 100)
    source.verify()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert [shard["count"] for shard in manifest["shards"]] == [4, 4, 2]
    assert manifest["source"] == "made up" and manifest["dtype"] == dtype


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


def test_a_failed_run_leaves_no_manifest_and_no_half_shard(tmp_path):
    latents, text = make_clips(6)
    with pytest.raises(RuntimeError), LatentWriter(tmp_path, SHAPE, TEXT) as writer:
        for clip in zip(latents, text, strict=True):
            writer.write(*clip)
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"manifest\.json is missing"):
        LatentSource(make_config(tmp_path))


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
        (lambda p: (p / "manifest.json").write_text('{"format": 1, "shards": [3]}'), r"is damaged"),
        (lambda p: (p / "00001.array_record").unlink(), r"00001\.array_record is missing in data"),
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
        "no_shard",
        "truncated_shard",
    ],
)
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage, message):
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message) as error:
        open_data(make_config(tmp_path))
    assert "LatentWriter; or run with --config.data.source=synthetic" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"looked for .*none/manifest\.json \(data\.path\)"):
        open_data(make_config(tmp_path / "none"))


def test_flipped_bits_are_found(tmp_path):
    write(tmp_path)
    source = LatentSource(make_config(tmp_path))
    flip(tmp_path / "00001.array_record", 0.3)
    with pytest.raises(ConfigError, match=r"00001\.array_record .*SHA-256"):
        source.verify()
    with pytest.raises(ConfigError, match=r"00001\.array_record .*is damaged") as error:
        source = LatentSource(make_config(tmp_path))
        for index in range(10):
            source[index]
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
