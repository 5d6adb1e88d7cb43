"""Names of Diffusers' WanTransformer3DModel."""

from arl2_jax.weights.layout import Layout, Rule, linear_rules


def _attention(source: str, path: str) -> tuple[Rule, ...]:
    source, path = f"blocks.{{i}}.{source}", f"blocks/{{i}}/{path}"
    return (
        *linear_rules(f"{source}.to_{{qkv}}", f"{path}/{{qkv}}"),
        *linear_rules(f"{source}.to_out.0", f"{path}/o"),
        Rule(f"{source}.norm_{{qk}}.weight", f"{path}/norm_{{qk}}/scale"),
    )


_EMBEDDER = "condition_embedder.{text|time}_embedder.linear"
DIFFUSERS = Layout(
    "Diffusers",
    (
        Rule("patch_embedding.weight", "patch_embedding/kernel", "o c t h w -> (t h w c) o"),
        Rule("patch_embedding.bias", "patch_embedding/bias"),
        *linear_rules(f"{_EMBEDDER}_1", "{text|time}_embedding/fc1"),
        *linear_rules(f"{_EMBEDDER}_2", "{text|time}_embedding/fc2"),
        *linear_rules("condition_embedder.time_proj", "time_projection"),
        Rule("scale_shift_table", "head/modulation", "1 n c -> n c"),
        *linear_rules("proj_out", "head/linear"),
        *_attention("attn1", "self_attn"),
        *_attention("attn2", "cross_attn"),
        # Its norm2 is the one with a scale, Wan's norm3.
        Rule("blocks.{i}.norm2.weight", "blocks/{i}/norm3/scale"),
        Rule("blocks.{i}.norm2.bias", "blocks/{i}/norm3/bias"),
        *linear_rules("blocks.{i}.ffn.net.0.proj", "blocks/{i}/ffn/fc1"),
        *linear_rules("blocks.{i}.ffn.net.2", "blocks/{i}/ffn/fc2"),
        Rule("blocks.{i}.scale_shift_table", "blocks/{i}/modulation", "1 n c -> n c"),
    ),
)
