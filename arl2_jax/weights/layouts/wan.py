"""Names of Wan2.1's own code, and what ARL2 adds to them."""

from arl2_jax.weights.layout import LINEAR, Layout, Rule, linear_rules

_FFN = (
    *linear_rules("blocks.{i}.ffn.0", "blocks/{i}/ffn/fc1"),
    *linear_rules("blocks.{i}.ffn.2", "blocks/{i}/ffn/fc2"),
)
_WRAPPED_FFN = (
    *linear_rules("blocks.{i}.ffn.0.linear", "blocks/{i}/ffn/fc1"),
    *linear_rules("blocks.{i}.ffn.2.linear", "blocks/{i}/ffn/fc2"),
)
_BACKBONE = (
    Rule("patch_embedding.weight", "patch_embedding/kernel", "o c t h w -> (t h w c) o"),
    Rule("patch_embedding.bias", "patch_embedding/bias"),
    *linear_rules("{text|time}_embedding.0", "{text|time}_embedding/fc1"),
    *linear_rules("{text|time}_embedding.2", "{text|time}_embedding/fc2"),
    *linear_rules("time_projection.1", "time_projection"),
    Rule("head.modulation", "head/modulation", "1 n c -> n c"),
    *linear_rules("head.head", "head/linear"),
    *linear_rules("blocks.{i}.{self|cross}_attn.{qkvo}", "blocks/{i}/{self|cross}_attn/{qkvo}"),
    Rule(
        "blocks.{i}.{self|cross}_attn.norm_{qk}.weight",
        "blocks/{i}/{self|cross}_attn/norm_{qk}/scale",
    ),
    Rule("blocks.{i}.norm3.weight", "blocks/{i}/norm3/scale"),
    Rule("blocks.{i}.norm3.bias", "blocks/{i}/norm3/bias"),
    Rule("blocks.{i}.modulation", "blocks/{i}/modulation", "1 n c -> n c"),
)
_MEMORY = (
    Rule(
        "blocks.{i}.self_attn.{a|b|gate}_proj.weight",
        "blocks/{i}/delta/{a|b|gate}_proj/kernel",
        LINEAR,
    ),
    Rule("blocks.{i}.self_attn.{A_log|dt_bias}", "blocks/{i}/delta/{A_log|dt_bias}"),
    # Not in published files: the bias of the strength, with memory_init="by_block".
    Rule("blocks.{i}.self_attn.b_proj.bias", "blocks/{i}/delta/beta_bias"),
    # A grouped convolution of width 1: head h has the rows h D to h D + D.
    Rule(
        "blocks.{i}.self_attn.phi_{qkv}.weight", "blocks/{i}/delta/phi_{qkv}", "(h o) i 1 -> h i o"
    ),
)
_LOW_RANK = (
    Rule("blocks.{i}.self_attn.lora_{qkv}_A", "blocks/{i}/delta/lora_{qkv}/a"),
    Rule("blocks.{i}.self_attn.lora_{qkv}_B", "blocks/{i}/delta/lora_{qkv}/b"),
    Rule("blocks.{i}.ffn.0.lora_A", "blocks/{i}/delta/lora_fc1/a"),
    Rule("blocks.{i}.ffn.0.lora_B", "blocks/{i}/delta/lora_fc1/b"),
    Rule("blocks.{i}.ffn.2.lora_A", "blocks/{i}/delta/lora_fc2/a"),
    Rule("blocks.{i}.ffn.2.lora_B", "blocks/{i}/delta/lora_fc2/b"),
)

WAN = Layout("Wan2.1", (*_BACKBONE, *_FFN))
ARL2 = Layout("ARL2", (*_BACKBONE, *_FFN, *_WRAPPED_FFN, *_MEMORY, *_LOW_RANK))


def wrapped_name(name: str) -> str:
    """Return the name of an FFN tensor of a hybrid layer with separate low-rank updates."""
    for part in (".ffn.0.", ".ffn.2."):
        if name.endswith((f"{part}weight", f"{part}bias")):
            return name.replace(part, f"{part}linear.")
    return name
