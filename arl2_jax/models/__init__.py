"""The causal Wan network."""

from arl2_jax.models.layer import Params
from arl2_jax.models.memories import (
    check_trainable,
    gathers,
    init_memory,
    unbounded_layers,
)
from arl2_jax.models.params import (
    base_of,
    cast_params,
    compute_shapes,
    init_params,
    param_shapes,
    stack_params,
    teacher_params,
    without_delta,
)
from arl2_jax.models.wan import (
    apply,
    apply_clip,
    apply_pass,
    encode_text,
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
    "teacher_params",
    "unbounded_layers",
    "without_delta",
]
