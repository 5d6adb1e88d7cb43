"""Encoding of prompts from files, and the cache of their embeddings."""

import functools
import gc
import os

import jax
import numpy as np
import pytest
from absl import logging
from one_line import assert_one_line
from safetensors.numpy import save_file
from umt5_files import as_params, draw, transformers_shapes, wan_shapes, write_tokenizer

from arl2_jax.config import UMT5Config
from arl2_jax.errors import ConfigError, WeightsError
from arl2_jax.models.umt5 import encode_tokens
from arl2_jax.text import Tokenizer, encode_prompts
from arl2_jax.text import encoder as encoder_module

CFG = UMT5Config.tiny(text_len=40, num_buckets=8, max_distance=128)
FOX, RIVER, NIGHT = "a red fox", "the river at night", "night"
LONG = "a red fox jumps over the river at night, jumping over the river."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths of a text encoder and its tokenizer, as `encode_prompts` takes them."""
    folder = tmp_path_factory.mktemp("release")
    weights = folder / "encoder.safetensors"
    save_file(draw(wan_shapes(CFG)), weights)
    return dict(text_encoder=weights, tokenizer=write_tokenizer(folder / "tokenizer"))


@pytest.fixture(scope="module")
def encode(files):
    return functools.partial(encode_prompts, **files, text_len=CFG.text_len, dtype="float32")


@pytest.fixture
def loads(monkeypatch):
    """The parameters of every time that the encoder was loaded."""
    loaded, load = [], encoder_module.load_text_encoder

    def recording(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(encoder_module, "load_text_encoder", recording)
    return loaded


@pytest.fixture
def warnings(monkeypatch):
    texts = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: texts.append(text % args))
    return texts


def entries(folder):
    return sorted(folder.iterdir())


def test_embeddings(encode, files, error):
    """Rows in the order of the prompts, repeated ones too; zeros past each prompt."""
    prompts = [FOX, LONG, " a&nbsp;red\nfox ", NIGHT]
    found = encode(prompts)
    assert found.dtype == np.float32 and found.shape == (4, CFG.text_len, CFG.dim)
    tokens, lengths = Tokenizer(files["tokenizer"])(prompts, CFG.text_len)
    assert 16 < lengths[1] < CFG.text_len and not np.any(found[0, lengths[0] :])
    wanted = encode_tokens(as_params(draw(wan_shapes(CFG)), CFG), CFG, tokens, lengths)
    # Float32 sums in another order: padding is of another width here.
    assert error(found, wanted) < 2e-6
    np.testing.assert_array_equal(found[2], found[0])


def test_an_embedding_does_not_depend_on_its_neighbours(encode):
    together = encode([LONG, FOX, RIVER])
    for row, prompt in enumerate((LONG, FOX, RIVER)):
        np.testing.assert_array_equal(encode([prompt])[0], together[row])


def test_layouts_agree(encode, tmp_path):
    """The same numbers under Transformers' names, in a folder as Diffusers writes it."""
    numbers = draw(wan_shapes(CFG)).values()
    names = transformers_shapes(CFG)
    save_file(dict(zip(names, numbers, strict=True)), tmp_path / "model.safetensors")
    np.testing.assert_array_equal(encode([FOX], text_encoder=tmp_path), encode([FOX]))


def test_known_prompts_do_not_load_the_encoder(encode, loads, tmp_path):
    first = encode([FOX, LONG], cache=tmp_path / "cache")
    assert len(loads) == 1 and len(entries(tmp_path / "cache")) == 2
    again = encode([LONG, FOX], cache=tmp_path / "cache")
    np.testing.assert_array_equal(again[::-1], first)
    assert len(loads) == 1
    # Only what is missing is encoded.
    mixed = encode([FOX, NIGHT], cache=tmp_path / "cache")
    assert len(loads) == 2 and len(entries(tmp_path / "cache")) == 3
    np.testing.assert_array_equal(mixed, encode([FOX, NIGHT]))


def test_prompts_that_clean_to_one_text_share_an_entry(encode, loads, tmp_path):
    first = encode([FOX], cache=tmp_path)
    again = encode([" a  red&nbsp;fox\n"], cache=tmp_path)
    np.testing.assert_array_equal(first, again)
    assert len(loads) == 1 and len(entries(tmp_path)) == 1


def test_what_an_embedding_depends_on(encode, loads, files, tmp_path):
    cache = tmp_path / "cache"
    encode([FOX], cache=cache)
    other = tmp_path / "other.safetensors"
    save_file(draw(wan_shapes(CFG), seed=1), other)
    words = write_tokenizer(tmp_path / "tokenizer", words=("▁a", "▁fox"))
    changes = [dict(text_encoder=other), dict(tokenizer=words), dict(text_len=48)]
    for n, change in enumerate([*changes, dict(dtype="bfloat16")], start=2):
        encode([FOX], cache=cache, **change)
        assert len(loads) == len(entries(cache)) == n
    # The place and the name of the files do not count.
    moved = tmp_path / "moved.safetensors"
    os.link(files["text_encoder"], moved)
    encode([FOX], cache=cache, text_encoder=moved)
    assert len(loads) == 5


@pytest.mark.parametrize("fault", ["truncated", "flipped", "empty", "other"])
def test_a_damaged_entry_is_made_anew(encode, loads, warnings, tmp_path, fault):
    first = encode([FOX], cache=tmp_path)
    (file,) = entries(tmp_path)
    content = bytearray(file.read_bytes())
    if fault == "flipped":
        content[-100] ^= 1
    elif fault == "other":
        save_file({"x": np.zeros(3)}, file)
        content = file.read_bytes()
    else:
        content = content[: len(content) // 2 if fault == "truncated" else 0]
    file.write_bytes(content)
    np.testing.assert_array_equal(encode([FOX], cache=tmp_path), first)
    (text,) = warnings
    assert len(loads) == 2 and str(file) in text and "damaged" in text and "\n" not in text
    encode([FOX], cache=tmp_path)
    assert len(loads) == 2 and len(warnings) == 1


def test_a_cache_that_cannot_be_written_only_warns(encode, warnings, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    found = encode([FOX], cache=tmp_path / "file" / "cache")
    np.testing.assert_array_equal(found, encode([FOX]))
    assert "is not cached" in warnings[-1] and all("\n" not in text for text in warnings)


def all_deleted(params):
    return all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_the_encoder_leaves_no_buffers(encode, loads):
    """Also where somebody still holds its parameters, as `loads` does."""
    encode([FOX])
    gc.collect()
    before = len(jax.live_arrays())
    encode([FOX, LONG])
    assert len(loads) == 2 and all_deleted(loads)
    gc.collect()
    assert len(jax.live_arrays()) == before


def test_the_encoder_is_freed_after_a_failure(encode, loads, monkeypatch):
    monkeypatch.setattr(encoder_module, "encode_tokens", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode([FOX])
    assert len(loads) == 1 and all_deleted(loads)


@pytest.mark.parametrize(
    ("prompts", "parts"),
    [
        ([], ["no prompt"]),
        ([""], ["empty"]),
        ([FOX, " \n&nbsp;"], ["empty"]),
        ([FOX, "fox " * 2500], ["2501 tokens", "40"]),
    ],
)
def test_bad_prompts(encode, loads, tmp_path, prompts, parts):
    """Nothing is loaded and nothing is kept."""
    with pytest.raises(ConfigError) as error:
        encode(prompts, cache=tmp_path / "cache")
    assert_one_line(error, *parts)
    assert not loads and not (tmp_path / "cache").exists()


def test_the_unconditional_text(encode):
    """Of an empty prompt only the end mark is left."""
    found = encode([""], allow_empty=True)
    assert np.any(found[0, 0]) and not np.any(found[0, 1:])


def test_missing_files(encode, loads, tmp_path):
    for name in ("text_encoder", "tokenizer"):
        with pytest.raises(WeightsError) as error:
            encode([FOX], **{name: tmp_path / "nowhere"})
        assert_one_line(error, tmp_path / "nowhere")
    assert not loads


def test_a_tokenizer_of_another_model(encode, loads, tmp_path):
    numbers = tuple(f"▁{n}" for n in range(4, CFG.vocab_size + 1))  # behind four other tokens
    other = write_tokenizer(tmp_path, words=numbers)
    encode([f"{CFG.vocab_size - 1}"], tokenizer=other)
    with pytest.raises(WeightsError) as error:
        encode([f"{CFG.vocab_size}"], tokenizer=other)
    assert_one_line(error, other, CFG.vocab_size, "name the tokenizer")
    assert len(loads) == 1
