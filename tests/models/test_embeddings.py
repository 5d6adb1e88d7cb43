"""The parts around the layers, and the norms inside them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arl2_jax.models.embeddings import modulate, timestep_features
from arl2_jax.models.layer import Conditions
from arl2_jax.models.wan import make_layer, make_stem
from arl2_jax.nn.norm import rms_norm
from arl2_jax.nn.positions import video_grid


@pytest.fixture(scope="module")
def stem(cfg, params):
    return make_stem(cfg, {name: node for name, node in params.items() if name != "blocks"})


@pytest.mark.parametrize("width", [16, 256])
def test_timestep_features_have_cosines_first(width):
    t = np.asarray([0.0, 1.0, 625.0, 937.5, 1000.0], np.float32)
    angles = np.outer(t, 10000.0 ** (-np.arange(width // 2) / (width // 2)))
    found = timestep_features(jnp.asarray(t), width)
    # Angles up to 1000 in float32, whose spacing there is 6e-5.
    np.testing.assert_allclose(found[:, : width // 2], np.cos(angles), atol=1e-4)
    np.testing.assert_allclose(found[:, width // 2 :], np.sin(angles), atol=1e-4)
    np.testing.assert_array_equal(found[0], [1] * (width // 2) + [0] * (width // 2))
    assert timestep_features(jnp.zeros((2, 3)), width).shape == (2, 3, width)


def test_tokens_are_patches_in_frame_row_column_order(stem, cfg):
    latents = np.random.default_rng(0).standard_normal((1, 2, 4, 6, 4)).astype(np.float32)
    tokens = stem.embed_patches(jnp.asarray(latents))
    kernel, bias = (np.asarray(stem.patch_embedding.kernel), np.asarray(stem.patch_embedding.bias))
    assert tokens.shape == (1, 2 * 2 * 3, cfg.dim)
    for token, (f, r, c) in enumerate(np.ndindex(2, 2, 3)):
        patch = latents[0, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]  # rows, columns, channels
        # float32 sums of 16 products
        np.testing.assert_allclose(tokens[0, token], patch.reshape(-1) @ kernel + bias, atol=1e-5)


def test_head_puts_patches_where_they_came_from(cfg, params):
    """A head whose features are a token's own number, told apart by (row, column, channel)."""
    features = np.arange(2 * 2 * 4, dtype=np.float32)

    def head(x, time):
        del time
        return x[..., :1] * 100 + features

    x = jnp.arange(12.0)[None, :, None] * jnp.ones((1, 12, cfg.dim))
    whole = make_stem(cfg, {name: node for name, node in params.items() if name != "blocks"})
    whole.head = head
    flow = whole.predict_flow(x, jnp.zeros((1, 2, cfg.dim)), 4, 6)
    for token, (f, r, c) in enumerate(np.ndindex(2, 2, 3)):
        patch = flow[0, f, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
        np.testing.assert_array_equal(patch, (token * 100 + features).reshape(2, 2, 4))


def test_modulation_is_per_frame():
    x = jnp.ones((1, 6, 2))
    shift = jnp.asarray([[[1.0, 2.0], [3.0, 4.0]]])
    out = modulate(x, shift, 10 * shift)
    np.testing.assert_array_equal(out[0, :3], [[1 + 10 + 1, 1 + 20 + 2]] * 3)
    np.testing.assert_array_equal(out[0, 3:], [[1 + 30 + 3, 1 + 40 + 4]] * 3)


def test_timestep_of_a_frame_moves_the_input_of_its_tokens_alone(stem, cfg, params):
    layer = make_layer(cfg, 2, params["blocks"]["2"])
    x = jax.random.normal(jax.random.key(0), (1, 18, cfg.dim))
    grid = video_grid(0, 3, 2, 3, cfg.head_dim)

    @jax.jit
    def attention_input(timestep):
        return layer.attention_input(x, Conditions(stem.embed_time(timestep)[1], grid))

    one = attention_input(jnp.asarray([[100.0, 100.0, 100.0]]))
    other = attention_input(jnp.asarray([[100.0, 700.0, 100.0]]))
    moved = np.any(np.reshape(one != other, (3, 6, cfg.dim)), axis=-1)
    assert moved.tolist() == [[False] * 6, [True] * 6, [False] * 6]


def test_layer_is_its_equations_outside_the_attention(cfg, params, error):
    """Order of the six modulation terms, gates, norms, and no modulation of cross-attention."""
    weights = params["blocks"]["2"]
    layer = make_layer(cfg, 2, weights)
    rng = np.random.default_rng(2)
    x, attended = rng.standard_normal((2, 1, 12, cfg.dim))
    time = rng.standard_normal((1, 2, 6, cfg.dim))
    text = rng.standard_normal((1, 5, cfg.dim))
    conditions = Conditions(jnp.asarray(time, jnp.float32), video_grid(0, 2, 2, 3, cfg.head_dim))

    @jax.jit
    def run(x, attended, text):
        h = layer.attention_input(x, conditions)
        return h, layer.finish(x, attended, conditions, layer.cross_attn.encode(text))

    single = (np.float32(y) for y in (x, attended, text))
    h, out = run(*single)

    w = jax.tree.map(np.float64, weights)
    per_token = np.repeat(w["modulation"] + time, 6, axis=1)
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = np.moveaxis(per_token, 2, 0)

    def norm(y):
        centred = y - y.mean(-1, keepdims=True)
        return centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + cfg.eps)

    def rms(y, name):
        mean = np.mean(y**2, -1, keepdims=True)
        return y / np.sqrt(mean + cfg.eps) * w["cross_attn"][name]["scale"]

    linear = lambda node, y: y @ node["kernel"] + node["bias"]
    gelu = lambda y: 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
    assert error(h, norm(x) * (1 + scale) + shift) < 1e-6  # float32
    y = x + gate * attended
    cross = w["cross_attn"]
    q = rms(linear(cross["q"], norm(y) * w["norm3"]["scale"] + w["norm3"]["bias"]), "norm_q")
    k, v = rms(linear(cross["k"], text), "norm_k"), linear(cross["v"], text)
    heads = lambda z: z.reshape(*z.shape[:2], cfg.num_heads, cfg.head_dim)
    scores = np.einsum("bqhd,bkhd->bhqk", heads(q), heads(k)) / np.sqrt(cfg.head_dim)
    weights_of_text = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    seen = np.einsum("bhqk,bkhd->bqhd", weights_of_text, heads(v)).reshape(y.shape)
    y = y + linear(cross["o"], seen)
    inner = gelu(linear(w["ffn"]["fc1"], norm(y) * (1 + ffn_scale) + ffn_shift))
    y = y + ffn_gate * linear(w["ffn"]["fc2"], inner)
    assert error(out, y) < 2e-6


def test_norm_of_queries_spans_all_heads(cfg, params):
    """A head that grows makes the others smaller: the norm comes before the split."""
    weights = params["blocks"]["0"]
    larger = jax.tree.map(lambda x: x, weights)
    kernel = larger["self_attn"]["q"]["kernel"]
    larger["self_attn"]["q"]["kernel"] = kernel.at[:, : cfg.head_dim].multiply(3)
    x = jax.random.normal(jax.random.key(0), (1, 6, cfg.dim))
    project = lambda w: make_layer(cfg, 0, w).self_attn.project(x)
    one, other = project(weights), project(larger)
    ratio = np.abs(other.q[:, :, 1] / one.q[:, :, 1])
    assert np.all(ratio < 0.95)
    wanted = rms_norm(one.q_raw, one.q_scale, cfg.eps).reshape(one.q.shape)
    np.testing.assert_array_equal(one.q, wanted)


def test_rms_norm_is_float32_inside():
    x = jnp.full((1, 4), 300.0, jnp.bfloat16)
    found = rms_norm(x, jnp.asarray([1.0, 2.0, 3.0, 4.0]), 1e-6)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(found), [[1, 2, 3, 4]])
    assert not np.any(rms_norm(jnp.zeros((1, 4)), jnp.ones(4), 1e-6))
