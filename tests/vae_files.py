"""Wan's published names of its autoencoder's tensors, spelled out from their specification.

The package has tables that read these layouts. The names here share nothing with them, so that each
checks the other.
"""

import zlib

import numpy as np
from einops import rearrange
from flax import traverse_util

from arl2_jax.config import VAEConfig

# The sizes of the golden file: odd widths, and other levels than Wan's.
GOLDEN = VAEConfig.tiny(
    dim=5, dim_mult=(2, 1, 3), temporal_downsample=(True, False), num_res_blocks=2, z_dim=3
)
# How the layers of a residual block, of an attention block and of either network are called.
ORIGINAL = dict(
    norm1="residual.0", conv1="residual.2", norm2="residual.3", conv2="residual.6",
    shortcut="shortcut", middle=("middle.0", "middle.1", "middle.2"), conv_in="conv1",
    norm_out="head.0", conv_out="head.2", quant="conv1", post_quant="conv2",
)  # fmt: skip
DIFFUSERS = dict(
    norm1="norm1", conv1="conv1", norm2="norm2", conv2="conv2", shortcut="conv_shortcut",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    conv_in="conv_in", norm_out="norm_out", conv_out="conv_out", quant="quant_conv",
    post_quant="post_quant_conv",
)  # fmt: skip


def published_shapes(cfg, names):
    """Shape of every tensor by its name, in the layout that `names` gives."""
    shapes = {}

    def conv(name, n_in, n_out, *kernel):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in, *kernel), (n_out,)

    def residual(name, n_in, n_out):
        shapes[f"{name}.{names['norm1']}.gamma"] = (n_in, 1, 1, 1)
        conv(f"{name}.{names['conv1']}", n_in, n_out, 3, 3, 3)
        shapes[f"{name}.{names['norm2']}.gamma"] = (n_out, 1, 1, 1)
        conv(f"{name}.{names['conv2']}", n_out, n_out, 3, 3, 3)
        if n_in != n_out:
            conv(f"{name}.{names['shortcut']}", n_in, n_out, 1, 1, 1)

    def ends(name, n_in, first, middle, last, n_out):
        conv(f"{name}.{names['conv_in']}", n_in, first, 3, 3, 3)
        before, attention, after = (f"{name}.{part}" for part in names["middle"])
        residual(before, middle, middle)
        shapes[f"{attention}.norm.gamma"] = (middle, 1, 1)
        conv(f"{attention}.to_qkv", middle, 3 * middle, 1, 1)
        conv(f"{attention}.proj", middle, middle, 1, 1)
        residual(after, middle, middle)
        shapes[f"{name}.{names['norm_out']}.gamma"] = (last, 1, 1, 1)
        conv(f"{name}.{names['conv_out']}", last, n_out, 3, 3, 3)

    widths, z = [cfg.dim * factor for factor in cfg.dim_mult], cfg.z_dim
    ends("encoder", 3, cfg.dim, widths[-1], widths[-1], 2 * z)
    ends("decoder", z, widths[-1], widths[-1], widths[0], 3)
    conv(names["quant"], 2 * z, 2 * z, 1, 1, 1)
    conv(names["post_quant"], z, z, 1, 1, 1)
    _levels(cfg, names is ORIGINAL, conv, residual)
    return shapes


def _levels(cfg, original, conv, residual):
    """The layers between, which the original numbers through and Diffusers' decoder by level."""
    widths = [cfg.dim * factor for factor in cfg.dim_mult]
    folder, index, n_in = "encoder.downsamples" if original else "encoder.down_blocks", 0, cfg.dim
    for level, width in enumerate(widths):
        for _ in range(cfg.num_res_blocks):
            residual(f"{folder}.{index}", n_in, width)
            index, n_in = index + 1, width
        if level < len(widths) - 1:
            conv(f"{folder}.{index}.resample.1", width, width, 3, 3)
            if cfg.temporal_downsample[level]:
                conv(f"{folder}.{index}.time_conv", width, width, 3, 1, 1)
            index += 1
    index, n_in = 0, widths[-1]
    for level, width in enumerate(widths[::-1]):
        for block in range(cfg.num_res_blocks + 1):
            place = f"upsamples.{index}" if original else f"up_blocks.{level}.resnets.{block}"
            residual(f"decoder.{place}", n_in, width)
            index, n_in = index + 1, width
        if level < len(widths) - 1:
            place = f"upsamples.{index}" if original else f"up_blocks.{level}.upsamplers.0"
            conv(f"decoder.{place}.resample.1", width, width // 2, 3, 3)
            if cfg.temporal_downsample[::-1][level]:
                conv(f"decoder.{place}.time_conv", width, 2 * width, 3, 1, 1)
            index, n_in = index + 1, width // 2


def draw_tensors(shapes):
    """Random tensors of which each depends on its name alone; nothing is zero, one or alike."""
    return {name: _draw(name, shape) for name, shape in shapes.items()}


def _draw(name, shape):
    # The old generator: its numbers are the same in every version of numpy.
    noise = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("weight"):
        noise *= np.prod(shape[1:]) ** -0.5
    elif name.endswith("gamma"):
        noise = 1 + 0.2 * noise
    else:
        noise *= 0.1
    return noise.astype(np.float32)


def as_params(tensors, layout):
    """Tensors of a layout as our parameters."""
    flat = {}
    for name, tensor in tensors.items():
        path, axes = layout.to_path(name)
        flat[path] = rearrange(tensor, axes) if axes else tensor
    return traverse_util.unflatten_dict(flat, sep="/")
