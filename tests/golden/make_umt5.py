"""Writes umt5.npz: a small UMT5 of Transformers with its outputs, to be compared without PyTorch.

    PYTHONPATH=.:tests python tests/golden/make_umt5.py      # needs the extra "parity"

Weights: `umt5_files.draw` under Transformers' names, seed 0, stored with the outputs, so that the
file stands on its own. Prompts: random tokens in 40 slots, of which 40, 17 and 1 are used; with 40
tokens every bucket of the relative positions is reached. Outputs past a length are set to zero, as
Wan does.
"""

from pathlib import Path

import numpy as np
from parity.umt5 import encode, umt5_of
from umt5_files import GOLDEN, draw, transformers_shapes

if __name__ == "__main__":
    tensors = draw(transformers_shapes(GOLDEN))
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, GOLDEN.vocab_size, (3, GOLDEN.text_len), np.int32)
    lengths = np.array([40, 17, 1], np.int32)
    outputs = encode(umt5_of(GOLDEN, tensors), tokens, lengths)
    file = Path(__file__).with_name("umt5.npz")
    np.savez_compressed(file, tokens=tokens, lengths=lengths, outputs=outputs, **tensors)
