"""Our converted layer is ARL2's, to the last sign: a reference that goes token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from parity.arl2 import HybridLayer, rotary_factors
from wan_names import from_original, original_tensors

from arl2_jax.config import ModelConfig
from arl2_jax.models.layer import Conditions
from arl2_jax.models.wan import make_layer
from arl2_jax.nn.positions import video_grid

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    "heads, head_dim, grid", [(2, 128, (1, 3, 5)), (3, 10, (3, 1, 7)), (1, 16, (2, 9, 5))]
)
def test_two_blocks_in_a_row(heads, head_dim, grid, error):
    """Tokens and state; the second block begins where the state and the position are not 0."""
    cfg = ModelConfig(
        dim=heads * head_dim, num_heads=heads, ffn_dim=40, num_layers=2, freq_dim=8, text_dim=6,
        in_dim=3, out_dim=3, hybrid_layers=(1,), lora_rank=3, lora_alpha=7.0,
    )  # fmt: skip
    tensors = original_tensors(cfg)
    reference = HybridLayer(tensors, 1, heads=heads, alpha=cfg.lora_alpha)
    weights = jax.tree.map(jnp.asarray, from_original(tensors, cfg)["blocks"]["1"])
    ours = make_layer(cfg, 1, weights)

    frames, rows, columns = grid
    tokens = rows * columns
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    text, state = draw(2, 4, cfg.dim), draw(2, heads, head_dim, head_dim)
    context, wanted_state = ours.cross_attn.encode(jnp.asarray(text)), torch.tensor(state).double()
    state = jnp.asarray(state)
    for first in (5, 5 + frames):
        x, modulation = draw(2, frames * tokens, cfg.dim), draw(2, frames, 6, cfg.dim)
        x_torch, text_torch = torch.tensor(x).double(), torch.tensor(text).double()
        of_tokens = torch.tensor(modulation).double().repeat_interleave(tokens, dim=1)
        turns = rotary_factors(first, *grid, head_dim)
        wanted = reference(x_torch, of_tokens, text_torch, turns, wanted_state)
        wanted_state = reference.write(x_torch, of_tokens, turns, wanted_state)

        conditions = Conditions(modulation, video_grid(first, *grid, head_dim))
        block = (jnp.asarray(x), conditions, context, state)
        read, kept, _ = ours.block(*block, write=False)
        found, state, _ = ours.block(*block, write=True)
        np.testing.assert_array_equal(kept, block[3])
        np.testing.assert_array_equal(read, found)
        assert error(found, wanted) < 5e-6
        assert error(state, wanted_state) < 5e-6
