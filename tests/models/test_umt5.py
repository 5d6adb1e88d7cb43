"""The text encoder: its numbers, its layouts, and what padding may not do."""

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from umt5_files import GOLDEN, as_params, draw, transformers_shapes, wan_shapes

from arl2_jax.config import UMT5Config
from arl2_jax.models import umt5
from arl2_jax.models.umt5 import encode_tokens, init_umt5, relative_buckets, umt5_shapes
from arl2_jax.weights.layouts.umt5 import LAYOUTS, TRANSFORMERS, WAN
from arl2_jax.weights.read import detect_layout, match
from arl2_jax.weights.tensors import FileTensor

CFG = UMT5Config.tiny(text_len=24, num_buckets=12, max_distance=20)
# Float32 sums in another order: some 1e-7 in every layer.
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def params():
    return as_params(draw(wan_shapes(CFG)), CFG)


@pytest.fixture(scope="module")
def prompts():
    """Tokens of three prompts of 24, 9 and 1 tokens, with noise in the padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, CFG.vocab_size, (3, CFG.text_len), np.int32)
    return tokens, np.array([24, 9, 1], np.int32)


def test_golden(error):
    golden = dict(np.load(Path(__file__).parents[1] / "golden" / "umt5.npz"))
    tokens, lengths, wanted = (golden.pop(name) for name in ("tokens", "lengths", "outputs"))
    found = encode_tokens(as_params(golden, GOLDEN), GOLDEN, tokens, lengths)
    assert found.dtype == jnp.float32
    assert error(found, wanted) < ROUNDING


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_layouts_at_true_size(layout):
    cfg = UMT5Config()
    names = (wan_shapes if layout is WAN else transformers_shapes)(cfg)
    opened = {
        name: FileTensor(shape, np.dtype("float32"), lambda index: pytest.fail("it was read"))
        for name, shape in names.items()
    }
    targets = traverse_util.flatten_dict(umt5_shapes(cfg), sep="/")
    assert detect_layout(opened, LAYOUTS, "a test") is layout
    assert len(match(opened, layout, targets, where="a test")) == len(opened) == 242
    assert sum(target.size for target in targets.values()) == 5_680_910_336
    kept = {path.split("/")[-1] for path, x in targets.items() if x.dtype == jnp.float32}
    assert kept == {"scale", "relative_bias"}


def test_layouts_are_two_names_of_one_model(params):
    """With the second name that Transformers gives to the token table."""
    translate = lambda name: TRANSFORMERS.to_source(WAN.to_path(name)[0])[0]
    tensors = {translate(name): x for name, x in draw(wan_shapes(CFG)).items()}
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    chex.assert_trees_all_equal(as_params(tensors, CFG), params)


def bucket(after: int, num_buckets: int, max_distance: int) -> int:
    """The rule in whole numbers: bounds of buckets are single * (max / single)^(k / count)."""
    half = num_buckets // 2
    single, distance = half // 2, abs(after)
    index = min(distance, single)
    count = half - single
    while index < half - 1 and distance >= single:
        k = index + 1 - single
        if distance**count * single**k < single**count * max_distance**k:
            break
        index += 1
    return index + (half if after > 0 else 0)


@pytest.mark.parametrize("sizes", [(32, 128), (12, 20), (8, 16), (4, 2), (64, 512)], ids=str)
def test_relative_buckets(sizes):
    length = 600
    wanted = {after: bucket(after, *sizes) for after in range(-length + 1, length)}
    found = relative_buckets(length, *sizes)
    assert found.dtype == np.int32 and set(found.flat) <= set(range(sizes[0]))
    for query in (0, 7, length - 1):
        assert found[query].tolist() == [wanted[key - query] for key in range(length)]


def test_padding_changes_nothing(params, prompts, error):
    tokens, lengths = prompts
    together = encode_tokens(params, CFG, tokens, lengths)
    assert together.shape == (*tokens.shape, CFG.dim)
    for row, n in enumerate(lengths):
        assert not np.any(together[row, n:])
        alone = encode_tokens(params, CFG, tokens[row : row + 1, :n], lengths[row : row + 1])
        assert error(together[row, :n], alone[0]) < ROUNDING
    other = np.where(np.arange(CFG.text_len) < lengths[:, None], tokens, 0)
    np.testing.assert_array_equal(encode_tokens(params, CFG, other, lengths), together)


def test_batch_equals_single(params, prompts, error):
    tokens, lengths = prompts
    together = encode_tokens(params, CFG, tokens, lengths)
    for row in range(3):
        part = slice(row, row + 1)
        single = encode_tokens(params, CFG, tokens[part], lengths[part])
        assert error(together[row], single[0]) < ROUNDING


def test_positions_matter(params, prompts, error):
    """Neither the order of tokens nor the direction of attention is lost."""
    tokens, lengths = prompts[0][:1], prompts[1][:1]
    found = encode_tokens(params, CFG, tokens, lengths)
    mirrored = encode_tokens(params, CFG, tokens[:, ::-1], lengths)
    assert error(mirrored[:, ::-1], found) > 0.1


def test_bfloat16_is_close(params, prompts, error):
    """bfloat16 rounds inputs of matrices to 2^-9; unscaled scores pass the errors on enlarged."""
    cfg = dataclasses.replace(CFG, dtype="bfloat16")
    cast = lambda x, target: jnp.asarray(x, target.dtype)
    rounded = jax.tree.map(cast, params, umt5_shapes(cfg))
    found = encode_tokens(rounded, cfg, *prompts)
    assert found.dtype == jnp.float32
    assert 1e-4 < error(found, encode_tokens(params, CFG, *prompts)) < 4e-2


def test_large_activations_stay_finite(params, prompts):
    """A trained UMT5 has residual streams beyond the range of float16."""
    table = {"embedding": 1e6 * params["token_embedding"]["embedding"]}
    found = encode_tokens(params | {"token_embedding": table}, CFG, *prompts)
    assert np.isfinite(found).all()


def test_one_program_for_every_depth(prompts):
    cfg = UMT5Config.tiny(num_layers=5)
    params = init_umt5(cfg, jax.random.key(0))
    before = umt5._apply_layer._cache_size()
    found = encode_tokens(params, cfg, *prompts)
    assert umt5._apply_layer._cache_size() == before + 1
    # Tokens of one standard deviation, layers that keep it.
    assert 0.5 < np.std(found[0]) < 2
    layers = [params["blocks"][str(i)]["attn"]["q"]["kernel"] for i in range(5)]
    assert all(np.any(layers[0] != layer) for layer in layers[1:])
