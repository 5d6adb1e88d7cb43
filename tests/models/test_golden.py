"""Outputs of Wan and of a converted layer, made once by others; see tests/golden.

Errors are below 1e-6: another order of sums. Bounds are ten times that.
"""

import jax
import jax.numpy as jnp
from wan_names import from_diffusers, from_original, golden

from arl2_jax import models
from arl2_jax.models.layer import Conditions
from arl2_jax.models.wan import make_layer
from arl2_jax.nn.positions import video_grid

GRID = (2, 3, 5)  # latent frames, rows and columns of tokens


def test_network(apply, error):
    cfg, tensors, arrays = golden("transformer")
    params = from_diffusers(tensors, cfg)
    memory = models.init_memory(cfg, batch=2, frames=GRID[0], tokens_per_frame=15)
    inputs = (jnp.asarray(arrays[name]) for name in ("latents", "timestep", "text"))
    flow, _ = apply(params, cfg, *inputs, memory=memory)
    assert error(flow, arrays["flow"]) < 1e-5


def block(cfg, layer, weights, state, first_frame, x, modulation, embedded):
    """(tokens, state) of one layer alone."""
    grid = video_grid(first_frame, *GRID, cfg.head_dim)
    layer = make_layer(cfg, layer, weights)
    context = layer.cross_attn.encode(embedded)
    return layer.block(x, Conditions(modulation, grid), context, state, write=True)[:2]


def test_one_layer(error):
    cfg, tensors, arrays = golden("transformer")
    weights = from_diffusers(tensors, cfg)["blocks"]["1"]
    memory = models.init_memory(cfg, batch=2, frames=GRID[0], tokens_per_frame=15)
    state = jax.tree.map(lambda layers: layers[1], memory[0])
    inputs = (arrays[name] for name in ("x", "modulation", "embedded"))
    y, _ = jax.jit(block, static_argnums=(0, 1))(cfg, 1, weights, state, 0, *inputs)
    assert error(y, arrays["y"]) < 5e-6


def test_two_blocks_of_a_converted_layer(error):
    cfg, tensors, arrays = golden("hybrid_layer")
    weights = from_original(tensors, cfg)["blocks"]["0"]
    (state,) = models.init_memory(cfg, batch=1, frames=0, tokens_per_frame=15)
    state, run = state[0], jax.jit(block, static_argnums=(0, 1))
    for i in range(2):
        inputs = (arrays["x"][i], arrays["modulation"][i], arrays["embedded"])
        y, state = run(cfg, 0, weights, state, i * GRID[0], *inputs)
        assert error(y, arrays["y"][i]) < 5e-6
        assert error(state, arrays["states"][i]) < 5e-6
