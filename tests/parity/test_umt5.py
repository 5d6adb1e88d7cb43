"""Our text encoder is Transformers' UMT5; prompts are cleaned and split as Diffusers does it.

Float32 on the CPU: errors are a few 1e-7 a layer where sums are taken in another order.
"""

import numpy as np
import pytest
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from parity.umt5 import encode, umt5_of
from transformers import PreTrainedTokenizerFast
from umt5_files import as_params, draw, transformers_shapes, write_tokenizer

from arl2_jax.config import UMT5Config
from arl2_jax.models.umt5 import encode_tokens
from arl2_jax.text import Tokenizer, clean_prompt, encode_prompts

pytestmark = pytest.mark.parity

CASES = {
    "tiny": UMT5Config.tiny(text_len=33),
    "deep": UMT5Config.tiny(num_layers=8, text_len=20, num_buckets=4, max_distance=3),
    "released heads and buckets": UMT5Config.tiny(
        dim=48, num_heads=2, head_dim=64, num_buckets=32, max_distance=128, text_len=300
    ),
    "narrow": UMT5Config.tiny(dim=10, num_heads=1, head_dim=6, ffn_dim=7, eps=1e-3, text_len=50),
}


@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
def test_encoder(cfg, error):
    tensors = draw(transformers_shapes(cfg), seed=3)
    rng = np.random.default_rng(4)
    tokens = rng.integers(0, cfg.vocab_size, (4, cfg.text_len), np.int32)
    lengths = np.array([cfg.text_len, cfg.text_len // 2, 2, 1], np.int32)
    found = encode_tokens(as_params(tensors, cfg), cfg, tokens, lengths)
    assert error(found, encode(umt5_of(cfg, tensors), tokens, lengths)) < 5e-6


NASTY = [
    "",
    "   ",
    "\t\n\r",
    "a",
    "  two   words\n\nand\ta tab ",
    "&amp;amp;amp;lt;b&gt;",
    "&lt;p&gt;x",
    "&nbsp;&nbsp;a&#160;b",
    "Ã©tÃ© Ã  Paris",
    "“curly” ‘quotes’ – dash … dots",
    "ﬁne ﬂow",
    "ｆｕｌｌ　ｗｉｄｔｈ",
    "a\u200bb\ufeffc\u00add",
    "line\u2028separator\u2029paragraph\x85next",
    "\x1c\x1d\x1e\x1f\x0b\x0c",
    "null\x00byte\x07bell",
    "\ud83d lone surrogate",
    "emoji 👩‍👩‍👧 flag 🇫🇷",
    "日本語　テキスト",
    "مرحبا بالعالم",
    "e\u0301 combining",
    "&#x41;&#65;&#xD800;&#0;&unknown;&amp",
    "<script>alert(1)</script>",
    "âœ” No problems",
    "schÃ¶n &amp;quot;x&amp;quot;",
    "\x1b[31mred\x1b[0m",
    "a" * 10_000,
    "word " * 3000,
    "&amp;" * 50,
    "Ñ¿",
    "\u3000\u2003a\u2009",
    "</s> <pad> <extra_id_0>",
    "l’été — “ok”",
    "1 &lt; 2 &amp;&amp; 3",
]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_cleaning(text):
    assert clean_prompt(text) == prompt_clean(text)


def open_tokenizer(folder):
    file = str(folder / "tokenizer.json")
    special = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_file=file, **special)


def test_tokens(tmp_path):
    folder = write_tokenizer(tmp_path)
    prompts = [text for text in NASTY if clean_prompt(text) and len(text) < 5000]
    prompts += ["a red fox jumps over the river at night", "The  Fox, jumping;over"]
    tokens, lengths = Tokenizer(folder)(prompts, 256)
    wanted = open_tokenizer(folder)(
        [prompt_clean(text) for text in prompts],
        padding="max_length",
        max_length=256,
        truncation=True,
        add_special_tokens=True,
        return_tensors="np",
    )
    np.testing.assert_array_equal(tokens, wanted["input_ids"])
    np.testing.assert_array_equal(lengths, wanted["attention_mask"].sum(axis=1))


def test_from_a_prompt_to_its_embedding(tmp_path, error):
    """As Diffusers' pipeline makes it, from a folder that Transformers itself has written."""
    cfg = CASES["released heads and buckets"]
    network = umt5_of(cfg, draw(transformers_shapes(cfg), seed=5))
    network.save_pretrained(tmp_path / "text_encoder")
    folder = write_tokenizer(tmp_path / "tokenizer")
    prompts = ["A  red fox &amp; the river", "night", "", "jumps over " * 20]
    pipeline = WanPipeline(open_tokenizer(folder), network, vae=None, scheduler=None)
    wanted, _ = pipeline.encode_prompt(
        prompts, do_classifier_free_guidance=False, max_sequence_length=cfg.text_len, device="cpu"
    )
    found = encode_prompts(
        prompts,
        text_encoder=tmp_path / "text_encoder",
        tokenizer=folder,
        text_len=cfg.text_len,
        dtype="float32",
        allow_empty=True,
    )
    assert error(found, wanted.detach()) < 5e-6
