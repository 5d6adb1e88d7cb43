"""What recomputation keeps of attention: its results, and nothing else."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.ad_checkpoint import saved_residuals
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from pallas_kernels import save_attention
from pallas_kernels.attention import splash
from pallas_kernels.attention.remat import CUDNN_FORWARD


def kept(attend, policy):
    """Activations that a layer of one product and attention keeps."""

    @jax.checkpoint
    def plain(x, w):
        return layer(x, w)

    def layer(x, w):
        return jnp.sum(jnp.sin(attend(*(jnp.einsum("btc,chd->bthd", x, w * i) for i in (1, 2, 3)))))

    run = jax.checkpoint(layer, policy=policy) if policy else plain
    x, w = jnp.ones((2, 128, 32), jnp.bfloat16), jnp.ones((32, 2, 64), jnp.bfloat16)
    saved = saved_residuals(run, x, w)
    return sorted(
        (aval.dtype.name, aval.shape)
        for aval, why in saved
        if "argument" not in why and jnp.issubdtype(aval.dtype, jnp.floating)
    )


def test_splash_attention_keeps_output_and_log_sum_exp():
    attend = lambda q, k, v: splash.attention(q, k, v, None, interpret=True)
    assert kept(attend, None) == []
    # Two clips under jax.vmap; heads come first.
    assert kept(attend, save_attention) == [
        ("bfloat16", (2, 2, 128, 64)), ("float32", (2, 2, 128)),
    ]  # fmt: skip


def test_cudnn_is_known_by_name():
    """If JAX renames it, nothing would be kept, without any error."""
    for primitive in (
        cudnn._dot_product_attention_fwd_p_wrapper,
        cudnn._dot_product_attention_fwd_p,
    ):
        assert primitive.name.startswith(CUDNN_FORWARD)
        assert save_attention(primitive)
    assert not save_attention(cudnn._dot_product_attention_bwd_p)


@pytest.mark.parametrize("name", ["attention_results_of_others", ""])
def test_other_names_are_not_kept(name):
    (equation,) = jax.make_jaxpr(lambda x: jax.ad_checkpoint.checkpoint_name(x, name))(1.0).eqns
    assert not save_attention(equation.primitive, **equation.params)
