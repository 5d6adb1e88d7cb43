"""Softmax attention, dispatched by device."""

from pallas_kernels.attention.api import dot_product_attention
from pallas_kernels.attention.merge import merge_attention
from pallas_kernels.attention.remat import save_attention

__all__ = ["dot_product_attention", "merge_attention", "save_attention"]
