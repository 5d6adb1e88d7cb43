"""The causal Wan network."""

from arl2_jax.models.wan import (
    Params,
    apply,
    apply_clip,
    cast_params,
    compute_shapes,
    encode_text,
    init_memory,
    init_params,
    param_shapes,
    stack_params,
    without_delta,
)

__all__ = [
    "Params",
    "apply",
    "apply_clip",
    "cast_params",
    "compute_shapes",
    "encode_text",
    "init_memory",
    "init_params",
    "param_shapes",
    "stack_params",
    "without_delta",
]
