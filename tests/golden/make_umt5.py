"""Writes umt5.npz: a small UMT5 of Transformers with its outputs, to be compared without PyTorch.

    python tests/golden/make_umt5.py      # needs the extra "parity"

Weights: `umt5_files.draw` under Transformers' names, seed 0, stored with the outputs, so that the
file stands on its own. Prompts: random tokens in 40 slots, of which 40, 17 and 1 are used; 40 tokens
reach every bucket of the relative positions. Outputs past a length are set to zero, as Wan does.
"""

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = map(str, (HERE.parents[1], HERE.parent))

from parity.umt5 import encode, umt5_of
from umt5_files import GOLDEN, draw, transformers_shapes

if __name__ == "__main__":
    tensors = draw(transformers_shapes(GOLDEN))
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, GOLDEN.vocab_size, (3, GOLDEN.text_len), np.int32)
    lengths = np.array([40, 17, 1], np.int32)
    outputs = encode(umt5_of(GOLDEN, tensors), tokens, lengths)
    np.savez_compressed(
        HERE / "umt5.npz", tokens=tokens, lengths=lengths, outputs=outputs, **tensors
    )
