import subprocess
import sys

import numpy as np

from arl2_jax.text import embed_caption


def test_one_word_a_slot_then_zeros():
    text = embed_caption("two sprites on a navy background", 8, 32)
    assert text.shape == (8, 32) and text.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(text[:6], axis=1), 1, rtol=1e-5)
    assert not text[6:].any()


def test_empty_caption_is_zeros_and_long_ones_are_cut():
    assert not embed_caption("", 8, 32).any()
    np.testing.assert_array_equal(embed_caption("a b c d", 2, 16), embed_caption("a b", 2, 16))


def test_equal_words_embed_equally_and_others_apart():
    text = embed_caption("Red red blue", 4, 512)
    np.testing.assert_array_equal(text[0], text[1])
    assert abs(text[0] @ text[2]) < 0.3


def test_is_the_same_in_every_process():
    code = "from arl2_jax.text import embed_caption as e; print(e('navy', 1, 4).tobytes().hex())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == embed_caption("navy", 1, 4).tobytes().hex()
