"""How a broken rule is reported."""


class ConfigError(ValueError):
    """A configuration that cannot be run: one line naming the field, its value and the remedy."""


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)
