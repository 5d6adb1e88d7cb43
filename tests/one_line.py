"""What a refusal looks like."""

from arl2_jax.errors import UserError


def assert_one_line(error, *parts):
    """An error for its user: one line that holds the parts, and no other error behind it."""
    assert isinstance(error.value, UserError)
    assert error.value.__context__ is None or error.value.__suppress_context__
    text = str(error.value)
    assert "\n" not in text and all(str(part) in text for part in parts)
