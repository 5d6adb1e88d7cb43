"""Cleaning of prompts, and their tokens."""

import numpy as np
import pytest
import tokenizers
from one_line import assert_one_line
from umt5_files import WORDS, write_tokenizer

from arl2_jax.errors import ConfigError, WeightsError
from arl2_jax.text import Tokenizer, clean_prompt

FIRST = 4  # <pad>, </s>, <unk> and the blank come before the words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        (" a \t red\n\nfox ", "a red fox"),
        ("a\u00a0red\u3000fox\u2028", "a red fox"),
        ("Ã©tÃ©", "été"),
        ("“quoted”", '"quoted"'),
        ("&amp;lt;b&amp;gt;", "<b>"),
        # Twice, not until nothing changes.
        ("<i> &amp;amp;amp;lt;", "<i> &amp;lt;"),
        ("&nbsp; ", ""),
        ("ﬁne", "fine"),
        ("a fox \U0001f98a 狐", "a fox \U0001f98a 狐"),
    ],
)
def test_clean_prompt(prompt, wanted):
    assert clean_prompt(prompt) == wanted


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_tokens(folder, name):
    tokens, lengths = Tokenizer(folder / name)([" a  red fox", "jumping"], 9)
    assert tokens.dtype == lengths.dtype == np.int32
    words = [WORDS.index(word) + FIRST for word in ("▁a", "▁red", "▁fox")]
    assert tokens[0].tolist() == [*words, 1, 0, 0, 0, 0, 0] and lengths[0] == 4
    # Letters and "ing" behind a blank, as no word of the vocabulary begins it.
    assert lengths[1] == 7 and tokens[1, 5:7].tolist() == [WORDS.index("ing") + FIRST, 1]


def test_limits_in_the_file_do_not_count(folder, tmp_path):
    """Released files may carry a truncation or a padding of their own."""
    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    other.enable_truncation(2)
    other.enable_padding(length=9, pad_id=1)
    other.save(str(tmp_path / "tokenizer.json"))
    (found, found_lengths), (wanted, lengths) = (
        Tokenizer(path)(["a red fox"], 8) for path in (tmp_path, folder)
    )
    assert found.tolist() == wanted.tolist() and found_lengths == lengths


def test_a_prompt_may_fill_its_room(folder):
    tokenizer = Tokenizer(folder)
    tokens, lengths = tokenizer(["a red fox"], 4)
    assert lengths.tolist() == [4] and tokens[0, -1] == 1
    with pytest.raises(ConfigError) as error:
        tokenizer(["a red fox", "a red fox jumps"], 4)
    assert_one_line(error, "a red fox jumps", "5 tokens", "4", "shorten it")


@pytest.mark.parametrize("prompt", ["a fox " * 1667, "x" * 10_000, "\n狐" * 5000])
def test_ten_thousand_characters(folder, prompt):
    with pytest.raises(ConfigError) as error:
        Tokenizer(folder)([prompt], 512)
    assert_one_line(error, "tokens", "512", "shorten it")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("prompt", ["", " \n\t", "&nbsp;"])
def test_empty_prompts(folder, prompt):
    tokenizer = Tokenizer(folder)
    with pytest.raises(ConfigError) as error:
        tokenizer(["a fox", prompt], 8)
    assert_one_line(error, "prompt is empty")
    tokens, lengths = tokenizer([prompt], 8, allow_empty=True)
    assert tokens[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0] and lengths.tolist() == [1]


def test_a_missing_tokenizer(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere" / "tokenizer.json"):
        with pytest.raises(WeightsError) as error:
            Tokenizer(path)
        assert_one_line(error, path, "tokenizer.json", "name the folder")


@pytest.mark.parametrize("content", [b"", b"{}", b"[1, 2]", b"\xff\x00", b'{"model": "\n"}'])
def test_a_damaged_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(WeightsError) as error:
        Tokenizer(tmp_path)(["a fox"], 8)
    assert_one_line(error, tmp_path / "tokenizer.json", "download it again")


def test_a_tokenizer_of_another_kind(tmp_path):
    with pytest.raises(WeightsError) as error:
        Tokenizer(write_tokenizer(tmp_path, specials=("[PAD]", "[UNK]")))(["a fox"], 8)
    assert_one_line(error, tmp_path, "</s>", "name another")


def test_fingerprints_tell_tokenizers_apart(folder, tmp_path):
    same, other = write_tokenizer(tmp_path / "a"), write_tokenizer(tmp_path / "b", WORDS[1:])
    assert Tokenizer(same).fingerprint == Tokenizer(folder).fingerprint
    assert Tokenizer(other).fingerprint != Tokenizer(folder).fingerprint
