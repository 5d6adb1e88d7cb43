"""Softmax attention, dispatched by device."""

from pallas_kernels.attention.api import dot_product_attention

__all__ = ["dot_product_attention"]
