import dataclasses
import itertools
import json
import threading

import chex
import jax
import numpy as np
import pytest
from data_sizes import make_data, make_sprites, tiny_model

from arl2_jax.config import Config, ShortClipsConfig
from arl2_jax.data import make_clip, open_data, open_short_data, reveals
from arl2_jax.data.sprite_clips import SpriteClips
from arl2_jax.data.sprites import HELD_OUT_SEED
from arl2_jax.errors import ConfigError


def make_config(**data):
    return Config(tiny_model(), data=make_data(**data))


def keys(batch):
    """One hashable per clip."""
    return [clip.tobytes() for clip in batch["latents"]]


def test_batches_hold_encoded_clips():
    data = open_data(make_config())
    batch = next(data.train_batches(5, seed=1))
    assert batch["latents"].shape == (5, 12, 6, 12, 48) and batch["latents"].dtype == np.float32
    assert batch["text"].shape == (5, 8, 32) and batch["text"].dtype == np.float32
    pixels = data.codec.decode(batch["latents"])
    assert pixels.min() >= -1 and pixels.max() <= 1


def test_same_seed_same_batches_and_no_clip_twice():
    data = open_data(make_config())
    first = list(itertools.islice(data.train_batches(4, seed=3), 5))
    for a, b in zip(first, data.train_batches(4, seed=3), strict=False):
        chex.assert_trees_all_equal(a, b)
    assert len({key for batch in first for key in keys(batch)}) == 20
    assert keys(next(data.train_batches(4, seed=4))) != keys(first[0])
    next(data.train_batches(4, seed=-1))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_bit_exactly(workers):
    data = open_data(make_config(workers=workers))
    batches = data.train_batches(3, seed=0)
    for _ in range(3):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    expected = [next(batches) for _ in range(3)]
    resumed = data.train_batches(3, seed=0)
    resumed.set_state(state)
    for batch in expected:
        chex.assert_trees_all_equal(next(resumed), batch)
    batches.set_state(state)
    chex.assert_trees_all_equal(next(batches), expected[0])
    for iterator in (batches, resumed):
        iterator.close()


def test_workers_give_the_same_batches():
    plain, shared = (open_data(make_config(workers=w)).train_batches(3, 0) for w in (0, 2))
    for _ in range(4):
        chex.assert_trees_all_equal(next(plain), next(shared))
    shared.close()


def test_processes_get_equal_parts_of_the_batch(monkeypatch):
    data = open_data(make_config())
    whole = data.train_batches(6, seed=2)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    shares = []
    for process in range(3):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(data.train_batches(6, seed=2))
    for _ in range(3):
        parts = [keys(next(share)) for share in shares]
        assert [len(part) for part in parts] == [2, 2, 2]
        assert sorted(itertools.chain(*parts)) == sorted(keys(next(whole)))
    with pytest.raises(ConfigError, match="batch_size=4 must be a multiple of the 3 processes"):
        data.train_batches(4, seed=0)


def test_held_out_clips_are_fixed_and_never_trained_on():
    data = open_data(make_config())
    held = data.held_out(6)
    chex.assert_trees_all_equal(held, open_data(make_config(workers=1)).held_out(6))
    np.testing.assert_array_equal(data.held_out(2)["latents"], held["latents"][:2])
    clip = make_clip(make_sprites(), make_data(), HELD_OUT_SEED + 3)
    np.testing.assert_allclose(
        data.codec.decode(held["latents"])[3], clip.video / 127.5 - 1, atol=1e-6
    )
    drawn = {key for batch in itertools.islice(data.train_batches(16, 0), 6) for key in keys(batch)}
    assert not drawn & set(keys(held))
    with pytest.raises(ConfigError, match=r"data\.held_out=64 is fewer than 65"):
        data.held_out(65)


def test_training_seeds_lie_below_the_held_out_ones(monkeypatch):
    seeds = []

    def record(sprites, data, seed):
        if threading.current_thread() is threading.main_thread():
            seeds.append(seed)
        return make_clip(sprites, data, seed)

    monkeypatch.setattr("arl2_jax.data.sprite_clips.make_clip", record)
    clips = open_data(make_config()).clips
    for index in range(20):
        clips.held_out(index)
        clips.training(index, np.random.default_rng(index))
    assert min(seeds[::2]) >= HELD_OUT_SEED > max(seeds[1::2])


@pytest.mark.parametrize("only", [False, True])
def test_only_reveals_leaves_out_clips_without_a_reveal(only):
    sprites = make_sprites(
        count=(1, 1), size=5, speed=(5.0, 5.0), occluder_width=10, pause=(2, 13), lamp=2,
        only_reveals=only,
    )  # fmt: skip
    config = make_config(frames=20, height=8, width=24, codec_factor=2, sprites=sprites)
    block, frames = config.model.frames_per_block, config.data.frames
    longer = SpriteClips(config.data, block, frames + 6)
    source, found = SpriteClips(config.data, block), []
    for index in range(24):
        video, caption = source.held_out(index)
        found.append(video.tobytes())
        again, _ = longer.held_out(index)
        np.testing.assert_array_equal(again[:frames], video)
        seeds = range(HELD_OUT_SEED + index, HELD_OUT_SEED + index + 64 * 2**40, 2**40)
        clips = (make_clip(sprites, config.data, seed) for seed in seeds)
        wanted = next(clip for clip in clips if not only or reveals(clip, block))
        np.testing.assert_array_equal(video, wanted.video)
        assert caption == wanted.caption
    assert len(set(found)) == len(found)


def test_impossible_sprites_are_refused_on_opening():
    with pytest.raises(ConfigError, match=r"data\.sprites\.size=13"):
        open_data(make_config(sprites=make_sprites(size=13)))


def test_impossible_short_clips_are_refused_on_opening():
    """Rests that fit a whole clip let nothing come out again within a short one."""
    sprites = make_sprites(pause=(2, 4))
    config = make_config(sprites=sprites, short=ShortClipsConfig(frames=6, pause=(4, 5)))
    open_data(config)
    with pytest.raises(ConfigError, match=r"data\.short.*data\.sprites\.pause=\(4, 5\)") as error:
        open_short_data(config, "teacher")
    assert "\n" not in str(error.value)
    # Not one clip in which a sprite has passed and come out again.
    asks = dataclasses.replace(sprites, only_reveals=True)
    asks = make_config(frames=24, sprites=asks, short=ShortClipsConfig(frames=4))
    open_data(asks)
    with pytest.raises(ConfigError, match=r"data\.short.*64 clips in a row have no reveal"):
        open_short_data(asks, "teacher")
    good = dataclasses.replace(config.data, short=ShortClipsConfig(frames=6))
    short = open_short_data(dataclasses.replace(config, data=good), "teacher")
    assert next(short.train_batches(2, 0))["latents"].shape[1] == 6
