"""Strict conversion of nested dicts: no unknown field, no wrong type."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from arl2_jax.config.memory import MemorySpec
from arl2_jax.config.rules import require
from arl2_jax.config.run import Config
from arl2_jax.config.training import PhaseConfig
from arl2_jax.errors import ConfigError


def from_config_dict(tree: Mapping[str, Any]) -> Config:
    """Convert a ConfigDict (or nested dict) to a checked `Config`.

    Raises:
      ConfigError: one line naming the first field that is unknown, missing or of the wrong type.
    """
    return _build(Config, tree, "")


def to_config_dict(config: Any) -> dict[str, Any]:
    """Convert a dataclass to a nested dict of plain values; the inverse of `from_config_dict`."""
    return dataclasses.asdict(config)


def _build(cls: type, tree: Any, path: str) -> Any:
    types_of = typing.get_type_hints(cls)
    hints = {field.name: types_of[field.name] for field in dataclasses.fields(cls)}
    require(
        isinstance(tree, Mapping) or hasattr(tree, "items"), path, tree, "must be a group of fields"
    )
    values = dict(tree.items())
    for name in values:
        if name not in hints:
            close = difflib.get_close_matches(str(name), hints, n=1)
            hint = f"did you mean {path}{close[0]}?" if close else f"known are {', '.join(hints)}"
            raise ConfigError("is an unknown field", field=f"{path}{name}", remedy=hint)
    for field in dataclasses.fields(cls):
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and field.name not in values:
            raise ConfigError("is missing", field=f"{path}{field.name}", remedy="set it")
    built = {name: _convert(hints[name], value, f"{path}{name}") for name, value in values.items()}
    try:
        return cls(**built)
    except ConfigError as error:
        # The rules of these classes do not know the path of their fields in the run.
        nested = issubclass(cls, PhaseConfig | MemorySpec)
        known = error.field and error.field.startswith(path)
        raise (error.within(path) if nested and not known else error) from None


def _convert(kind: Any, value: Any, path: str) -> Any:
    """Check a value against a field's type; lists become tuples, whole numbers floats."""
    origin = get_origin(kind)
    if kind is Any:  # the settings of a memory, which checks them
        return dict(value.items()) if hasattr(value, "items") else value
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, f"{path}.")
    if origin is Literal:
        choices = get_args(kind)
        require(value in choices, path, value, f"must be one of {', '.join(map(str, choices))}")
        return value
    if origin is tuple:
        require(
            isinstance(value, Iterable) and not isinstance(value, str | bytes),
            path,
            value,
            "must be a sequence",
        )
        inner, items = get_args(kind), list(value)
        if len(inner) == 2 and inner[1] is Ellipsis:
            inner = (inner[0],) * len(items)
        require(len(items) == len(inner), path, value, f"must have {len(inner)} entries")
        return tuple(
            _convert(k, v, f"{path}[{i}]")
            for i, (k, v) in enumerate(zip(inner, items, strict=True))
        )
    if isinstance(kind, types.UnionType):
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    mismatch = kind is not bool and isinstance(value, bool)
    require(
        isinstance(value, kind) and not mismatch,
        path,
        value,
        f"must be of type {kind.__name__}, not {type(value).__name__}",
    )
    return value
