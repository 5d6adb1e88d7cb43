"""What recomputation of a layer should keep of attention."""

from typing import Any

# Names of JAX's own: its attention by cuDNN is a primitive, whose results are the output and the
# log-sum-exp, and splash attention names the same two.
CUDNN_FORWARD = "dot_product_attention_fwd"
SPLASH_RESULTS = "attention_results"


def save_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    """Keep the results of attention: a policy for `jax.checkpoint`.

    The backward pass of attention needs its output and log-sum-exp. With these kept, what is
    recomputed of a layer is all but its attention: memory of one more [B, T, H, D] a layer.
    Queries, keys and values are recomputed. XLA's attention is too.
    """
    if primitive.name.startswith(CUDNN_FORWARD):
        return True
    return primitive.name == "name" and params["name"] == SPLASH_RESULTS
