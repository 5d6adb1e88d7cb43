"""Planted models, whose memories are known to carry identity or not, get the right scores."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax.codecs import make_codec
from arl2_jax.config import Config, DataConfig, EvaluationConfig, ModelConfig, SpriteConfig
from arl2_jax.evaluation.exchange import (
    OUTCOMES,
    draw_test,
    exchange_scores,
    layer_flips,
    outcomes,
)
from arl2_jax.evaluation.gap import Model
from arl2_jax.evaluation.measure import recall_scores
from arl2_jax.evaluation.recall import NOTHING, recall_test, wilson
from arl2_jax.generation.exchange import EXCHANGES, OfLayers, exchanges_of, swap_twins

CONFIG = Config(
    ModelConfig.tiny(),
    data=DataConfig(
        frames=16, height=8, width=32, codec_factor=2,
        sprites=SpriteConfig(count=(1, 1), pause=(0, 4)),
    ),
    evaluation=EvaluationConfig(recall_clips=40, recall_noises=3),
)  # fmt: skip
KEY = jax.random.key(0)
F = CONFIG.model.frames_per_block


@pytest.fixture(scope="module")
def held_out():
    return recall_test(CONFIG, make_codec(CONFIG))


def planted(carrier, seen=None):
    """A model that draws the true block of the clip whose `carrier` memory it reads.

    It keeps every call in `seen`. Without the memory it draws nothing but the background.
    """

    def draw(params, cfg, sampler, text, keys, clips, block, *, exchanges):
        assert len(clips) % 2 == 0 and exchanges == exchanges_of(cfg)
        if seen is not None:
            drawn_from = np.asarray(jax.random.key_data(keys)).tobytes()
            seen.append((np.asarray(clips), int(block), drawn_from))
        own = jnp.asarray(clips[:, block * F :][:, :F])
        ground = np.broadcast_to(clips[:, :1, :1, :1], own.shape)
        for_exchange = {
            "none": own,
            "states": swap_twins(own) if carrier == "states" else own,
            "caches": swap_twins(own) if carrier == "caches" else own,
            "zeroed": ground if carrier == "states" else own,
        }
        made = np.stack([for_exchange[name] for name in exchanges])
        return np.broadcast_to(made[:, None], (len(made), len(keys), *own.shape))

    return draw


def drawn(held_out, draw, cfg=CONFIG.model):
    model = Model({"w": jnp.zeros(1)}, cfg)
    return draw_test(CONFIG, make_codec(CONFIG), model, held_out, KEY, kept=6, draw=draw)


def shares(scores, name):
    return [scores[name][outcome] for outcome in ("own", "twin", "nothing")]


def test_identity_in_the_states_is_found_there(held_out):
    scores = exchange_scores(drawn(held_out, planted("states")), held_out.identities)
    assert shares(scores, "none") == shares(scores, "caches") == [1, 0, 0]
    assert shares(scores, "states") == [0, 1, 0]
    assert scores["zeroed"]["own"] == 0 and scores["zeroed"]["nothing"] > 0.7
    assert scores["carried"] == {"states": 1, "caches": 0}


def test_identity_in_the_caches_is_found_there(held_out):
    scores = exchange_scores(drawn(held_out, planted("caches")), held_out.identities)
    assert shares(scores, "none") == shares(scores, "states") == [1, 0, 0]
    assert shares(scores, "caches") == [0, 1, 0] and shares(scores, "zeroed") == [1, 0, 0]
    assert scores["carried"] == {"states": 0, "caches": 1}


def test_what_a_model_does_not_have_is_null(held_out):
    teacher = drawn(held_out, planted("caches"), CONFIG.model.teacher())
    scores = exchange_scores(teacher, held_out.identities)
    assert scores["states"] is scores["zeroed"] is scores["carried"]["states"] is None
    assert scores["carried"]["caches"] == 1
    hybrid = dataclasses.replace(CONFIG.model, hybrid_layers=(0, 1, 2))
    scores = exchange_scores(drawn(held_out, planted("states"), hybrid), held_out.identities)
    assert scores["caches"] is scores["carried"]["caches"] is None
    assert scores["carried"]["states"] == 1


def test_a_model_that_draws_nothing_carries_nothing(held_out):
    blank = lambda *args, **options: np.zeros_like(planted("states")(*args, **options)) - 0.95
    scores = exchange_scores(drawn(held_out, blank), held_out.identities)
    assert shares(scores, "states")[:2] == [0, 0]
    assert scores["carried"] == {"states": None, "caches": None}


def test_every_clip_is_drawn_once_with_its_twin_in_its_own_block(held_out):
    seen = []
    drawn(held_out, planted("states", seen))
    wanted = Counter(
        (clip.tobytes(), event.block)
        for clip, event in zip(held_out.batch["latents"], held_out.events, strict=True)
    )
    found = Counter((clip.tobytes(), block) for clips, block, _ in seen for clip in clips)
    # Parts of a group are filled up with clips of the same group.
    assert found.keys() == wanted.keys() and all(found[x] >= wanted[x] for x in wanted)
    assert len({keys for *_, keys in seen}) == len(seen), "parts have different noise"
    assert {clips.shape for clips, *_ in seen} == {(16, 16, 4, 16, 12)}
    index = {clip.tobytes(): i for i, clip in enumerate(held_out.batch["latents"])}
    for clips, *_ in seen:
        for one, other in zip(clips[::2], clips[1::2], strict=True):
            assert index[other.tobytes()] == index[one.tobytes()] + 1


def test_frames_are_those_that_are_read(held_out):
    made = drawn(held_out, planted("states"))
    assert made.readings["none"].shape == (3, 40, 2)
    for i, event in enumerate(held_out.events[:6]):
        np.testing.assert_array_equal(made.frames["none"][i], held_out.clips[i].video[event.frame])
        twin = held_out.clips[i ^ 1].video[event.frame]
        np.testing.assert_array_equal(made.frames["states"][i], twin)


def test_outcomes_are_own_twin_other_and_nothing():
    identities = np.array([[0, 1], [2, 0]])
    readings = np.array(
        [
            [[0, 1], [2, 0]],
            [[2, 0], [0, 1]],
            [[0, 0], [2, 1]],  # half right is wrong
            [[NOTHING, NOTHING], [1, 1]],
        ]
    )
    found = outcomes(readings, identities)
    names = [[OUTCOMES[i] for i in row] for row in found]
    assert names == [["own"] * 2, ["twin"] * 2, ["other"] * 2, ["nothing", "other"]]


def test_shares_are_means_over_noises_and_intervals_count_clips(held_out):
    """Two of three drawings of every clip are right."""

    def draw(*args, **options):
        made = np.array(planted("states")(*args, **options))
        made[:, 0] = swap_twins(jnp.asarray(made[:, 0]), axis=1)
        return made

    made = drawn(held_out, draw)
    scores = exchange_scores(made, held_out.identities)["none"]
    np.testing.assert_allclose([scores["own"], scores["twin"]], [2 / 3, 1 / 3])
    assert scores["intervals"]["own"] == wilson(scores["own"], 40)
    report = recall_scores(CONFIG, held_out, {"student": made})
    assert report["recall"]["student"]["recall"] == scores["own"]
    assert report["recall"]["teacher"] is report["exchange"]["teacher"] is None
    by_lag = report["recall_by_lag"]["student"]
    assert set(by_lag) == set(held_out.lags.tolist()) and len(by_lag) > 2
    for lag, score in by_lag.items():
        assert score["clips"] == np.sum(held_out.lags == lag)
        np.testing.assert_allclose(score["recall"], 2 / 3)


def test_all_exchanges_are_scored(held_out):
    scores = exchange_scores(drawn(held_out, planted("states")), held_out.identities)
    assert set(scores) == {*EXCHANGES, "carried"}


def test_flips_are_found_in_the_layer_that_carries(held_out):
    """Layer 1 alone carries identity, and of three noises one forgets it in any case."""

    def draw(params, cfg, sampler, text, keys, clips, block, *, exchanges):
        own = jnp.asarray(clips[:, block * F :][:, :F])
        made = np.stack([swap_twins(own) if x == wanted[2] else own for x in exchanges])
        made = np.array(np.broadcast_to(made[:, None], (len(made), len(keys), *own.shape)))
        made[:, 0] = clips[:, :1, :1, :1]
        return made

    wanted = ("none", *(OfLayers("caches", (i,)) for i in range(3)))
    model = Model({"w": jnp.zeros(1)}, CONFIG.model.teacher())
    drawings = draw_test(
        CONFIG, make_codec(CONFIG), model, held_out, KEY, exchanges=wanted, draw=draw
    )
    found = layer_flips(drawings, held_out.identities)
    assert found["recall"] == pytest.approx(2 / 3) and found["clips"] == 40
    scores = found["layers"]
    assert [scores[i]["flip"] for i in range(3)] == pytest.approx([0, 2 / 3, 0])
    assert shares(scores, 0)[:2] == pytest.approx([2 / 3, 0])
    assert shares(scores, 1)[:2] == pytest.approx([0, 2 / 3])
    assert scores[1]["intervals"]["flip"] == wilson(scores[1]["flip"], 40)
