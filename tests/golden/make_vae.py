"""Writes vae.npz: what Diffusers' AutoencoderKLWan makes of random weights.

    PYTHONPATH=.:tests python tests/golden/make_vae.py      # needs the extra "parity"

Written with Diffusers 0.42 and torch 2.13, float32 on a CPU. Weights are `draw_tensors` of the
names and shapes that Diffusers' own model has, so each depends on its name alone and none is
stored. Pixels and latents are drawn by numpy's old generator, seed 0, whose numbers never change.
The widths are odd, and the levels are not those of the released model.
"""

from pathlib import Path

import numpy as np
import torch
from parity.vae import decode, diffusers_vae, encode
from vae_files import GOLDEN, draw_tensors

if __name__ == "__main__":
    network = diffusers_vae(GOLDEN)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    tensors = {name: torch.from_numpy(x) for name, x in draw_tensors(shapes).items()}
    network.load_state_dict(tensors)
    draw = np.random.RandomState(0)
    pixels = draw.uniform(-1, 1, (2, 5, 12, 20, 3)).astype(np.float32)
    latents = draw.standard_normal((2, 3, 3, 5, GOLDEN.z_dim)).astype(np.float32)
    np.savez_compressed(
        Path(__file__).with_name("vae.npz"),
        names=sorted(shapes),
        pixels=pixels,
        encoded=encode(network, GOLDEN, pixels),
        latents=latents,
        decoded=decode(network, GOLDEN, latents),
    )
