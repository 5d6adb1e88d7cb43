"""Makes transformer.npz and hybrid_layer.npz, the figures of tests/models/test_golden.py.

    pip install '.[parity]'
    PYTHONPATH=tests python tests/golden/make_transformer.py

transformer.npz: Diffusers' WanTransformer3DModel with random weights under Diffusers' names (keys
"weights/..."), the flow that it predicts for a clip, and what its middle layer makes of random
tokens. hybrid_layer.npz: a model with one converted layer under ARL2's names, and what the
reference in tests/parity/arl2.py makes of two blocks in a row. All is float32; inputs and weights
follow from the seeds in here.
"""

import json
from pathlib import Path

import numpy as np
import torch
from parity.arl2 import HybridLayer, rotary_factors
from parity.wan import channels_first, channels_last, per_token, random_inputs, random_wan
from wan_names import original_tensors

from arl2_jax.config import ModelConfig

SIZES = dict(
    dim=24, num_heads=2, ffn_dim=40, freq_dim=16, text_dim=10, text_len=5, in_dim=4, out_dim=4,
)  # fmt: skip
GRID = (2, 3, 5)  # latent frames, rows and columns of tokens


def write(name, sizes, weights, **arrays):
    stored = {f"weights/{key}": np.asarray(value) for key, value in weights.items()}
    file = Path(__file__).with_name(f"{name}.npz")
    arrays = {key: np.float32(value) for key, value in arrays.items()}
    np.savez_compressed(file, config=json.dumps(sizes), **stored, **arrays)
    print(file, file.stat().st_size)


def make_transformer():
    sizes = SIZES | dict(num_layers=3, frames_per_block=GRID[0])
    cfg = ModelConfig(**sizes)
    network = random_wan(cfg)
    frames, rows, columns = GRID
    latents, timestep, text = random_inputs(cfg, frames=frames, rows=rows, columns=columns)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, frames * rows * columns, cfg.dim)).astype(np.float32)
    modulation = rng.standard_normal((2, frames, 6, cfg.dim)).astype(np.float32)
    embedded = rng.standard_normal((2, cfg.text_len, cfg.dim)).astype(np.float32)
    video, tokens = channels_first(latents), rows * columns
    with torch.no_grad():
        flow = network(video, per_token(timestep, tokens), torch.tensor(np.asarray(text))).sample
        of_tokens = torch.tensor(modulation).repeat_interleave(tokens, dim=1)
        layer = network.blocks[1](
            torch.tensor(x), torch.tensor(embedded), of_tokens, network.rope(video)
        )
    write(
        "transformer", sizes, network.state_dict(),
        latents=latents, timestep=timestep, text=text, flow=channels_last(flow),
        x=x, modulation=modulation, embedded=embedded, y=layer,
    )  # fmt: skip


def make_hybrid_layer():
    sizes = SIZES | dict(num_layers=1, hybrid_layers=[0], lora_rank=3, lora_alpha=7.0)
    cfg = ModelConfig(**sizes)
    tensors = original_tensors(cfg)
    layer = HybridLayer(tensors, 0, heads=cfg.num_heads, alpha=cfg.lora_alpha)
    frames, rows, columns = GRID
    rng = np.random.default_rng(1)
    draw = lambda *shape: torch.tensor(rng.standard_normal(shape).astype(np.float32)).double()
    x = draw(2, 1, frames * rows * columns, cfg.dim)  # block, video, token
    modulation = draw(2, 1, frames, 6, cfg.dim)
    embedded = draw(1, cfg.text_len, cfg.dim)
    states = [torch.zeros(1, cfg.num_heads, cfg.head_dim, cfg.head_dim).double()]
    outputs = []
    for block in range(2):
        turns = rotary_factors(block * frames, *GRID, cfg.head_dim)
        of_tokens = modulation[block].repeat_interleave(rows * columns, dim=1)
        outputs.append(layer(x[block], of_tokens, embedded, turns, states[-1]))
        states.append(layer.write(x[block], of_tokens, turns, states[-1]))
    write(
        "hybrid_layer", sizes, tensors,
        x=x, modulation=modulation, embedded=embedded,
        y=torch.stack(outputs), states=torch.stack(states[1:]),
    )  # fmt: skip


if __name__ == "__main__":
    make_transformer()
    make_hybrid_layer()
