"""Attention kernels for JAX: the gated delta state recurrence and softmax attention."""

from pallas_kernels.attention import dot_product_attention, merge_attention, save_attention
from pallas_kernels.gated_delta import gated_delta_states

__all__ = ["dot_product_attention", "gated_delta_states", "merge_attention", "save_attention"]
