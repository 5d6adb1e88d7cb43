"""Names of the UMT5 encoder: in Wan2.1's own code, and in Transformers' UMT5EncoderModel."""

from arl2_jax.weights.layout import LINEAR, Layout, Rule

WAN = Layout(
    "Wan2.1 text encoder",
    (
        Rule("token_embedding.weight", "token_embedding/embedding"),
        Rule("blocks.{i}.norm{1|2}.weight", "blocks/{i}/norm{1|2}/scale"),
        Rule("blocks.{i}.attn.{qkvo}.weight", "blocks/{i}/attn/{qkvo}/kernel", LINEAR),
        Rule("blocks.{i}.pos_embedding.embedding.weight", "blocks/{i}/attn/relative_bias"),
        Rule("blocks.{i}.ffn.gate.0.weight", "blocks/{i}/ffn/gate/kernel", LINEAR),
        Rule("blocks.{i}.ffn.{fc1|fc2}.weight", "blocks/{i}/ffn/{fc1|fc2}/kernel", LINEAR),
        Rule("norm.weight", "norm/scale"),
    ),
)

_ATTENTION, _FFN = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
TRANSFORMERS = Layout(
    "Transformers UMT5",
    (
        Rule("shared.weight", "token_embedding/embedding"),
        Rule(f"{_ATTENTION}.layer_norm.weight", "blocks/{i}/norm1/scale"),
        Rule(
            f"{_ATTENTION}.SelfAttention.{{qkvo}}.weight", "blocks/{i}/attn/{qkvo}/kernel", LINEAR
        ),
        Rule(
            f"{_ATTENTION}.SelfAttention.relative_attention_bias.weight",
            "blocks/{i}/attn/relative_bias",
        ),
        Rule(f"{_FFN}.layer_norm.weight", "blocks/{i}/norm2/scale"),
        # GELU is applied to wi_0.
        Rule(f"{_FFN}.DenseReluDense.wi_0.weight", "blocks/{i}/ffn/gate/kernel", LINEAR),
        Rule(f"{_FFN}.DenseReluDense.wi_1.weight", "blocks/{i}/ffn/fc1/kernel", LINEAR),
        Rule(f"{_FFN}.DenseReluDense.wo.weight", "blocks/{i}/ffn/fc2/kernel", LINEAR),
        Rule("encoder.final_layer_norm.weight", "norm/scale"),
    ),
    aliases={"encoder.embed_tokens.weight": "shared.weight"},
)

LAYOUTS = (WAN, TRANSFORMERS)
