"""Recall in long true videos: what is drawn, and what is counted."""

import jax
import numpy as np

from arl2_jax.codecs import make_codec
from arl2_jax.config import Config, DataConfig, ModelConfig, SamplerConfig, SpriteConfig
from arl2_jax.evaluation.gap import Model
from arl2_jax.evaluation.long_recall import Stretch, draw_along, long_recall, long_recall_scores
from arl2_jax.evaluation.recall import NOTHING
from arl2_jax.generation.exchange import draw_exchanged


def test_a_block_is_drawn_as_after_the_clip_before_it(cfg, params):
    model, f = Model(params, cfg), cfg.frames_per_block
    sampler = SamplerConfig(method="euler", steps=2)
    clips = jax.random.normal(jax.random.key(1), (2, 4 * f, 4, 6, cfg.in_dim))
    text = jax.random.normal(jax.random.key(2), (2, cfg.text_len, cfg.text_dim))
    blocks = [clips[:, i : i + f] for i in range(0, 4 * f, f)]
    key = jax.random.key(3)
    drawn = dict(draw_along(model, sampler, text, blocks, {0, 2}, 4, key))
    assert sorted(drawn) == [0, 2]
    for i, block in drawn.items():
        own = jax.random.fold_in(key, i)
        expected = draw_exchanged(*model, sampler, text, own[None], clips, i)[0, 0]
        # Two programs may add in different orders: values up to 7 differ by 2e-6 in float32.
        np.testing.assert_allclose(block, expected, rtol=0, atol=1e-5)
    changed = [-blocks[0], *blocks[1:]]
    other = dict(draw_along(model, sampler, text, changed, {2}, 4, key))
    assert abs(other[2] - drawn[2]).max() > 1e-3


def test_sprites_that_come_back_are_counted():
    shown = np.array([[3, 1], [NOTHING, 1], [3, 1], [NOTHING, NOTHING], [3, NOTHING], [3, 1]])
    shown, wanted = shown[:, None], np.array([[3, 1]])
    drawn = {i: np.array([[3, NOTHING]]) for i in range(1, 6)}
    parts = [Stretch(1, 1), Stretch(2, 3), Stretch(4, 5)]
    scores = long_recall_scores(shown, drawn, wanted, parts)
    assert [part["count"] for part in scores] == [0, 1, 2]
    assert [part["recall"] for part in scores] == [None, 1, 1 / 2]
    assert [part["other"] for part in scores] == [None, 0, 0]
    drawn[4] = np.array([[2, 1]])
    assert long_recall_scores(shown, drawn, wanted, parts)[2]["other"] == 1 / 2
    assert scores[0]["interval"] is None and scores[2]["blocks"] == [4, 5]
    assert scores[2]["videos"] == 1


def test_true_videos_hold_what_is_asked(monkeypatch):
    """A model that draws the truth recalls all of it, one that draws an old block less."""
    sprites = SpriteConfig(
        count=(1, 2), size=7, speed=(4.0, 5.0), occluder_width=13, pause=(4, 9), lamp=2
    )
    data = DataConfig(frames=8, height=16, width=40, sprites=sprites)
    config = Config(ModelConfig.tiny(), data=data)

    def recall(late):
        def draw(model, sampler, text, blocks, asked, count, key):
            seen = []
            for i, block in enumerate(blocks):
                seen.append(block)
                if i in asked:
                    yield i, seen[i - late]

        monkeypatch.setattr("arl2_jax.evaluation.long_recall.draw_along", draw)
        model = Model({}, config.model)
        parts, key = [Stretch(1, 12), Stretch(40, 60)], jax.random.key(0)
        return long_recall(config, make_codec(config), model, key, videos=4, stretches=parts)

    now, before = recall(0), recall(1)
    assert [part["recall"] for part in now] == [1, 1]
    assert [part["count"] for part in now] == [part["count"] for part in before]
    assert now[1]["count"] > 10 and before[1]["recall"] < 0.5
