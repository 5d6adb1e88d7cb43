"""Outputs of Wan and of a converted layer, made once by others; see tests/golden.

Errors are below 1e-6: another order of sums. Bounds are ten times that.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from wan_names import from_diffusers, from_original

from arl2_jax import models
from arl2_jax.config import ModelConfig
from arl2_jax.models.layer import Conditions
from arl2_jax.models.wan import make_layer
from arl2_jax.nn.rope import video_rope

GOLDEN = Path(__file__).parents[1] / "golden"
GRID = (2, 3, 5)  # latent frames, rows and columns of tokens


def load(name):
    """(cfg, weights by their published names, arrays)."""
    arrays = {key: value for key, value in np.load(GOLDEN / f"{name}.npz").items()}
    cfg = ModelConfig(**json.loads(str(arrays.pop("config"))))
    start = "weights/"
    names = [key for key in arrays if key.startswith(start)]
    return cfg, {name.removeprefix(start): arrays.pop(name) for name in names}, arrays


def test_network(apply, error):
    cfg, tensors, golden = load("transformer")
    params = from_diffusers(tensors, cfg)
    memory = models.init_memory(cfg, batch=2, frames=GRID[0], tokens_per_frame=15)
    inputs = (jnp.asarray(golden[name]) for name in ("latents", "timestep", "text"))
    flow, _ = apply(params, cfg, *inputs, memory=memory)
    assert error(flow, golden["flow"]) < 1e-5


def block(cfg, kind, weights, state, first_frame, x, modulation, embedded):
    """(tokens, state) of one layer alone."""
    rope = video_rope(first_frame, *GRID, cfg.head_dim)
    layer = make_layer(cfg, kind, weights)
    context = layer.cross_attn.encode(embedded)
    position = first_frame * GRID[1] * GRID[2]
    return layer.block(x, Conditions(modulation, rope), context, state, position, write=True)


def test_one_layer(error):
    cfg, tensors, golden = load("transformer")
    weights = from_diffusers(tensors, cfg)["blocks"]["1"]
    memory = models.init_memory(cfg, batch=2, frames=GRID[0], tokens_per_frame=15)
    state = jax.tree.map(lambda layers: layers[1], memory[0])
    inputs = (golden[name] for name in ("x", "modulation", "embedded"))
    y, _ = jax.jit(block, static_argnums=(0, 1))(cfg, "softmax_cache", weights, state, 0, *inputs)
    assert error(y, golden["y"]) < 5e-6


def test_two_blocks_of_a_converted_layer(error):
    cfg, tensors, golden = load("hybrid_layer")
    weights = from_original(tensors, cfg)["blocks"]["0"]
    (state,) = models.init_memory(cfg, batch=1, frames=0, tokens_per_frame=15)
    state, run = state[0], jax.jit(block, static_argnums=(0, 1))
    for i in range(2):
        inputs = (golden["x"][i], golden["modulation"][i], golden["embedded"])
        y, state = run(cfg, "gated_delta", weights, state, i * GRID[0], *inputs)
        assert error(y, golden["y"][i]) < 5e-6
        assert error(state, golden["states"][i]) < 5e-6
