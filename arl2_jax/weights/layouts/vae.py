"""Names of Wan's video autoencoder: in Wan2.1_VAE.pth, and in Diffusers' AutoencoderKLWan."""

from arl2_jax.config import VAEConfig
from arl2_jax.weights.layout import Layout, Rule

_CONV = "o i t h w -> t h w i o"
_CONV_2D = "o i h w -> h w i o"
_TIME_CONV = "o i t 1 1 -> t i o"
_POINTWISE = "o i 1 1 1 -> i o"
_POINTWISE_2D = "o i 1 1 -> i o"
_SCALE = "c 1 1 1 -> c"
_SCALE_2D = "c 1 1 -> c"

# Parts of a layer: (name in the original, in Diffusers, in our tree, map of the axes).
_RESIDUAL = (
    ("residual.0.gamma", "norm1.gamma", "norm1/scale", _SCALE),
    ("residual.2", "conv1", "conv1", _CONV),
    ("residual.3.gamma", "norm2.gamma", "norm2/scale", _SCALE),
    ("residual.6", "conv2", "conv2", _CONV),
    ("shortcut", "conv_shortcut", "shortcut", _POINTWISE),
)
_RESAMPLE = (
    ("resample.1", "resample.1", "conv", _CONV_2D),
    ("time_conv", "time_conv", "time_conv", _TIME_CONV),
)
_ATTENTION = (
    ("norm.gamma", "norm.gamma", "norm/scale", _SCALE_2D),
    ("to_qkv", "to_qkv", "qkv", _POINTWISE_2D),
    ("proj", "proj", "proj", _POINTWISE_2D),
)
_ENDS = (
    ("conv1", "conv_in", "conv_in", _CONV),
    ("head.0.gamma", "norm_out.gamma", "norm_out/scale", _SCALE),
    ("head.2", "conv_out", "conv_out", _CONV),
)
_QUANT = (
    ("conv1", "quant_conv", "encoder/quant_conv", _POINTWISE),
    ("conv2", "post_quant_conv", "decoder/post_quant_conv", _POINTWISE),
)

_BOTH = ("{encoder|decoder}", "{encoder|decoder}")
_MIDDLE = "{encoder|decoder}/middle"


def layouts(cfg: VAEConfig) -> tuple[Layout, ...]:
    """Return the original layout and Diffusers', whose decoder block numbers depend on `cfg`."""
    return WAN, Layout("Diffusers VAE", _diffusers_rules(cfg))


def _rules(column: int, parts, source: str = "", path: str = "") -> tuple[Rule, ...]:
    """Return the rules of one layer or, with placeholders, of many; `column` chooses the layout."""
    rules = []
    for names in parts:
        name, ours, axes = ".".join(filter(None, (source, names[column]))), names[2], names[3]
        ours = "/".join(filter(None, (path, ours)))
        if ours.endswith("/scale"):
            rules.append(Rule(name, ours, axes))
        else:
            rules += [
                Rule(f"{name}.weight", f"{ours}/kernel", axes),
                Rule(f"{name}.bias", f"{ours}/bias"),
            ]
    return tuple(rules)


WAN = Layout(
    "Wan2.1 VAE",
    (
        *_rules(0, _QUANT),
        *_rules(0, _ENDS, *_BOTH),
        *_rules(0, _RESIDUAL, "{encoder|decoder}.middle.{i}", f"{_MIDDLE}/{{i}}"),
        *_rules(0, _ATTENTION, "{encoder|decoder}.middle.{i}", f"{_MIDDLE}/{{i}}"),
        *_rules(0, _RESIDUAL, "encoder.downsamples.{i}", "encoder/downsamples/{i}"),
        *_rules(0, _RESAMPLE, "encoder.downsamples.{i}", "encoder/downsamples/{i}"),
        *_rules(0, _RESIDUAL, "decoder.upsamples.{i}", "decoder/upsamples/{i}"),
        *_rules(0, _RESAMPLE, "decoder.upsamples.{i}", "decoder/upsamples/{i}"),
    ),
)


def _diffusers_rules(cfg: VAEConfig) -> tuple[Rule, ...]:
    middle = "{encoder|decoder}.mid_block"
    rules = [
        *_rules(1, _QUANT),
        *_rules(1, _ENDS, *_BOTH),
        *_rules(1, _RESIDUAL, f"{middle}.resnets.0", f"{_MIDDLE}/0"),
        *_rules(1, _ATTENTION, f"{middle}.attentions.0", f"{_MIDDLE}/1"),
        *_rules(1, _RESIDUAL, f"{middle}.resnets.1", f"{_MIDDLE}/2"),
        *_rules(1, _RESIDUAL, "encoder.down_blocks.{i}", "encoder/downsamples/{i}"),
        *_rules(1, _RESAMPLE, "encoder.down_blocks.{i}", "encoder/downsamples/{i}"),
    ]
    # Diffusers numbers the decoder's layers within each level; we number them consecutively, as
    # the original does.
    blocks = cfg.num_res_blocks + 1
    for level in range(len(cfg.dim_mult)):
        source, start = f"decoder.up_blocks.{level}", level * (blocks + 1)
        for i in range(blocks):
            path = f"decoder/upsamples/{start + i}"
            rules += _rules(1, _RESIDUAL, f"{source}.resnets.{i}", path)
        path = f"decoder/upsamples/{start + blocks}"
        rules += _rules(1, _RESAMPLE, f"{source}.upsamplers.0", path)
    return tuple(rules)
