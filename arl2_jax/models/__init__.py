"""The causal Wan network."""

from arl2_jax.models.wan import (
    Params,
    apply,
    apply_clip,
    apply_pass,
    base_of,
    cast_params,
    check_trainable,
    compute_shapes,
    encode_text,
    gathers,
    init_memory,
    init_params,
    param_shapes,
    stack_params,
    unbounded_layers,
    without_delta,
)

__all__ = [
    "Params",
    "apply",
    "apply_clip",
    "apply_pass",
    "base_of",
    "cast_params",
    "check_trainable",
    "compute_shapes",
    "encode_text",
    "gathers",
    "init_memory",
    "init_params",
    "param_shapes",
    "stack_params",
    "unbounded_layers",
    "without_delta",
]
