"""Checks of configuration values."""

from typing import Any

from arl2_jax.errors import ConfigError


def require(condition: bool, field: str, value: Any, rule: str, remedy: str | None = None) -> None:
    """Raise a ConfigError, "FIELD=VALUE RULE; REMEDY", unless the condition holds."""
    if not condition:
        raise ConfigError(rule, field=field, value=value, remedy=remedy)
