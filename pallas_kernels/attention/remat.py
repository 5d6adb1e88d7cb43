"""A rematerialization policy that saves the results of attention."""

from typing import Any

# JAX's own names: its attention by cuDNN is a primitive, whose results are output and log-sum-exp,
# and splash attention names the same two.
CUDNN_FORWARD = "dot_product_attention_fwd"
SPLASH_RESULTS = "attention_results"


def save_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """Save the results of attention: a policy for `jax.checkpoint`.

    The backward pass of attention needs its output and log-sum-exp. With these saved, everything in
    a layer is recomputed except its attention, for the memory of one more [B, T, H, D] per layer.
    Queries, keys and values are recomputed, and so is XLA's attention.
    """
    if primitive.name.startswith(CUDNN_FORWARD):
        return True
    return primitive.name == "name" and params["name"] == SPLASH_RESULTS
