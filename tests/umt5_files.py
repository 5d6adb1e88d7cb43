"""Files of a small text encoder: its tensors in both published layouts, and a tokenizer.

Names and shapes are spelled out from the layouts' specification. The package has tables that read
them; what stands here shares nothing with them, so that each checks the other.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tokenizers
from flax import traverse_util
from tokenizers import models, pre_tokenizers, processors

from arl2_jax.config import UMT5Config
from arl2_jax.models.umt5 import umt5_shapes
from arl2_jax.weights.layouts import umt5
from arl2_jax.weights.read import read_tree
from arl2_jax.weights.tensors import FileTensor

WORDS = ("▁a", "▁red", "▁fox", "▁jumps", "▁over", "▁the", "▁river", "▁at", "▁night", "ing")
LETTERS = "abcdefghijklmnopqrstuvwxyz.,&<>;"
# The model of golden/umt5.npz.
GOLDEN = UMT5Config(
    vocab_size=50, dim=16, ffn_dim=20, num_heads=3, head_dim=6, num_layers=3, num_buckets=12,
    max_distance=30, text_len=40, dtype="float32",
)  # fmt: skip


def wan_shapes(cfg: UMT5Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of Wan2.1's .pth file."""
    width = cfg.num_heads * cfg.head_dim
    shapes: dict[str, tuple[int, ...]] = {"token_embedding.weight": (cfg.vocab_size, cfg.dim)}
    for i in range(cfg.num_layers):
        block = f"blocks.{i}"
        shapes |= {
            f"{block}.norm1.weight": (cfg.dim,),
            f"{block}.attn.q.weight": (width, cfg.dim),
            f"{block}.attn.k.weight": (width, cfg.dim),
            f"{block}.attn.v.weight": (width, cfg.dim),
            f"{block}.attn.o.weight": (cfg.dim, width),
            f"{block}.norm2.weight": (cfg.dim,),
            f"{block}.ffn.gate.0.weight": (cfg.ffn_dim, cfg.dim),
            f"{block}.ffn.fc1.weight": (cfg.ffn_dim, cfg.dim),
            f"{block}.ffn.fc2.weight": (cfg.dim, cfg.ffn_dim),
            f"{block}.pos_embedding.embedding.weight": (cfg.num_buckets, cfg.num_heads),
        }
    return shapes | {"norm.weight": (cfg.dim,)}


def transformers_shapes(cfg: UMT5Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Diffusers release's text_encoder folder."""
    names = {
        "norm1": "layer.0.layer_norm",
        "attn.q": "layer.0.SelfAttention.q",
        "attn.k": "layer.0.SelfAttention.k",
        "attn.v": "layer.0.SelfAttention.v",
        "attn.o": "layer.0.SelfAttention.o",
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "norm2": "layer.1.layer_norm",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
    }
    outside = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
    shapes = {}
    for name, shape in wan_shapes(cfg).items():
        head, _, rest = name.removesuffix(".weight").partition(".")
        index, _, part = rest.partition(".")
        there = f"encoder.block.{index}.{names[part]}" if head == "blocks" else outside[head]
        shapes[f"{there}.weight"] = shape
    return shapes


def draw(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors, at which nothing is trivially zero, one or the identity."""
    rng = np.random.default_rng(seed)

    def one(name, shape):
        noise = rng.standard_normal(shape)
        if len(shape) == 1:
            return 1 + 0.2 * noise
        tables = ("embed", "shared", "relative")
        return noise if any(part in name for part in tables) else noise * shape[1] ** -0.5

    return {name: one(name, shape).astype(np.float32) for name, shape in shapes.items()}


def as_params(tensors: Mapping[str, np.ndarray], cfg: UMT5Config):
    """Parameters from tensors of either layout."""
    opened = {
        name: FileTensor(x.shape, x.dtype, lambda index, x=x: x[index])
        for name, x in tensors.items()
    }
    targets = traverse_util.flatten_dict(umt5_shapes(cfg), sep="/")
    flat = read_tree(opened, umt5.LAYOUTS, targets, where="a test")
    return traverse_util.unflatten_dict(flat, sep="/")


def write_tokenizer(folder: Path, words=WORDS, specials=("<pad>", "</s>", "<unk>")) -> Path:
    """A tokenizer.json that is built as T5's: pieces with scores, and an end mark."""
    pieces = [(piece, 0.0) for piece in specials]
    pieces += [("▁", -2.0), *((word, -3.0) for word in words), *((x, -6.0) for x in LETTERS)]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=len(specials) - 1))
    split = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    made.pre_tokenizer = pre_tokenizers.Sequence(split)
    if "</s>" in specials:
        end = [("</s>", specials.index("</s>"))]
        made.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=end)
    made.add_special_tokens(list(specials))
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder
