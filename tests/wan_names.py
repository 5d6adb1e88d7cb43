"""Wan's published names of tensors, spelled out from their specification.

The package has tables that read these layouts. What stands here shares nothing with them, so that
each checks the other.
"""

import json
from pathlib import Path

import numpy as np

from arl2_jax.config import ModelConfig


def golden(name):
    """What tests/golden/make_transformer.py stored: (cfg, weights by their names, arrays)."""
    arrays = dict(np.load(Path(__file__).with_name("golden") / f"{name}.npz"))
    cfg, start = ModelConfig(**json.loads(str(arrays.pop("config")))), "weights/"
    weights = {key: arrays.pop(key) for key in list(arrays) if key.startswith(start)}
    return cfg, {key.removeprefix(start): x for key, x in weights.items()}, arrays


def original_tensors(cfg, seed=0):
    """Random tensors of a Wan2.1 model in its own names and shapes.

    Hybrid layers carry ARL2's additions. Nothing is zero, one or the identity.
    """
    rng = np.random.default_rng(seed)
    draw = lambda shape, size, mean: mean + size * rng.standard_normal(shape)
    return {name: draw(*kind).astype(np.float32) for name, kind in original_kinds(cfg).items()}


def original_kinds(cfg):
    """(shape, spread, mean) of every tensor by its name."""
    c, heads, width, rank = cfg.dim, cfg.num_heads, cfg.dim // cfg.num_heads, cfg.lora_rank
    kinds = {}

    def put(name, *shape, size=0.3, mean=0.0):
        kinds[name] = shape, size, mean

    def linear(name, n_in, n_out):
        put(f"{name}.weight", n_out, n_in, size=n_in**-0.5)
        put(f"{name}.bias", n_out)

    def low_rank(name, n_in, n_out):
        put(f"{name}A", n_in, rank)
        put(f"{name}B", rank, n_out)

    put("patch_embedding.weight", c, cfg.in_dim, *cfg.patch_size)
    put("patch_embedding.bias", c)
    linear("text_embedding.0", cfg.text_dim, c)
    linear("text_embedding.2", c, c)
    linear("time_embedding.0", cfg.freq_dim, c)
    linear("time_embedding.2", c, c)
    linear("time_projection.1", c, 6 * c)
    linear("head.head", c, cfg.out_dim * cfg.patch_size[1] * cfg.patch_size[2])
    put("head.modulation", 1, 2, c)
    for i in range(cfg.num_layers):
        block = f"blocks.{i}"
        for attention in ("self_attn", "cross_attn"):
            for letter in "qkvo":
                linear(f"{block}.{attention}.{letter}", c, c)
            for letter in "qk":
                put(f"{block}.{attention}.norm_{letter}.weight", c, mean=1)
        put(f"{block}.norm3.weight", c, mean=1)
        put(f"{block}.norm3.bias", c)
        put(f"{block}.modulation", 1, 6, c)
        hybrid = i in cfg.hybrid_layers
        wrapped = ".linear" if hybrid else ""
        linear(f"{block}.ffn.0{wrapped}", c, cfg.ffn_dim)
        linear(f"{block}.ffn.2{wrapped}", cfg.ffn_dim, c)
        if not hybrid:
            continue
        attention = f"{block}.self_attn"
        for name in ("a_proj", "b_proj", "gate_proj"):
            put(f"{attention}.{name}.weight", heads, c)
        put(f"{attention}.A_log", heads)
        put(f"{attention}.dt_bias", heads, mean=-2)
        for letter in "qkv":
            put(f"{attention}.phi_{letter}.weight", c, width, 1)
            low_rank(f"{attention}.lora_{letter}_", c, c)
        low_rank(f"{block}.ffn.0.lora_", c, cfg.ffn_dim)
        low_rank(f"{block}.ffn.2.lora_", cfg.ffn_dim, c)
    return kinds


def from_original(tensors, cfg):
    """Our tree from Wan's and ARL2's own names."""
    linear = lambda name: _linear(tensors, name)
    scale = lambda name: {"scale": tensors[f"{name}.weight"]}
    mlp = lambda name, end="": {"fc1": linear(f"{name}.0{end}"), "fc2": linear(f"{name}.2{end}")}
    low_rank = lambda name: {"a": tensors[f"{name}A"], "b": tensors[f"{name}B"]}

    def attention(name):
        norms = {f"norm_{letter}": scale(f"{name}.norm_{letter}") for letter in "qk"}
        return {letter: linear(f"{name}.{letter}") for letter in "qkvo"} | norms

    def delta(block):
        own = f"{block}.self_attn"
        per_head = lambda w: w[..., 0].reshape(cfg.num_heads, cfg.head_dim, cfg.head_dim)
        return {
            **{n: _kernel(tensors, f"{own}.{n}") for n in ("a_proj", "b_proj", "gate_proj")},
            **{name: tensors[f"{own}.{name}"] for name in ("A_log", "dt_bias")},
            # A convolution multiplies from the left, [out, in]; ours from the right.
            **{
                f"phi_{x}": per_head(tensors[f"{own}.phi_{x}.weight"]).swapaxes(1, 2) for x in "qkv"
            },
            **{f"lora_{x}": low_rank(f"{own}.lora_{x}_") for x in "qkv"},
            "lora_fc1": low_rank(f"{block}.ffn.0.lora_"),
            "lora_fc2": low_rank(f"{block}.ffn.2.lora_"),
        }

    def layer(i):
        block, hybrid = f"blocks.{i}", i in cfg.hybrid_layers
        own = {
            "self_attn": attention(f"{block}.self_attn"),
            "cross_attn": attention(f"{block}.cross_attn"),
            "norm3": scale(f"{block}.norm3") | {"bias": tensors[f"{block}.norm3.bias"]},
            "ffn": mlp(f"{block}.ffn", ".linear" if hybrid else ""),
            "modulation": tensors[f"{block}.modulation"][0],
        }
        return own | {"delta": delta(block)} if hybrid else own

    return {
        "patch_embedding": _patches(tensors),
        "text_embedding": mlp("text_embedding"),
        "time_embedding": mlp("time_embedding"),
        "time_projection": linear("time_projection.1"),
        "head": {"linear": linear("head.head"), "modulation": tensors["head.modulation"][0]},
        "blocks": {str(i): layer(i) for i in range(cfg.num_layers)},
    }


def from_diffusers(tensors, cfg):
    """Our tree from the names that Diffusers gave to the same tensors."""
    linear = lambda name: _linear(tensors, name)
    scale = lambda name: {"scale": tensors[f"{name}.weight"]}

    def attention(name):
        ours = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
        norms = {f"norm_{letter}": scale(f"{name}.norm_{letter}") for letter in "qk"}
        return {letter: linear(f"{name}.{theirs}") for letter, theirs in ours.items()} | norms

    def layer(i):
        block = f"blocks.{i}"
        return {
            "self_attn": attention(f"{block}.attn1"),
            "cross_attn": attention(f"{block}.attn2"),
            "norm3": scale(f"{block}.norm2") | {"bias": tensors[f"{block}.norm2.bias"]},
            "ffn": {"fc1": linear(f"{block}.ffn.net.0.proj"), "fc2": linear(f"{block}.ffn.net.2")},
            "modulation": tensors[f"{block}.scale_shift_table"][0],
        }

    def embedder(kind):
        name = f"condition_embedder.{kind}_embedder.linear_"
        return {"fc1": linear(f"{name}1"), "fc2": linear(f"{name}2")}

    return {
        "patch_embedding": _patches(tensors),
        "text_embedding": embedder("text"),
        "time_embedding": embedder("time"),
        "time_projection": linear("condition_embedder.time_proj"),
        "head": {"linear": linear("proj_out"), "modulation": tensors["scale_shift_table"][0]},
        "blocks": {str(i): layer(i) for i in range(cfg.num_layers)},
    }


def _kernel(tensors, name):
    return {"kernel": tensors[f"{name}.weight"].T}


def _linear(tensors, name):
    return _kernel(tensors, name) | {"bias": tensors[f"{name}.bias"]}


def _patches(tensors):
    """The convolution as a product: a patch's features in the order (rows, columns, channels)."""
    weight = tensors["patch_embedding.weight"]
    kernel = weight.transpose(2, 3, 4, 1, 0).reshape(-1, weight.shape[0])
    return {"kernel": kernel, "bias": tensors["patch_embedding.bias"]}
