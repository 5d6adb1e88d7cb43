"""How the tests check calls against annotations, for `jaxtyping.install_import_hook`."""

import functools
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import jax
from beartype import BeartypeConf, beartype
from beartype.door import is_bearable
from beartype.vale import Is

# An int may stand for a float, as in type checkers.
_beartype = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable) -> Callable:
    """`beartype.beartype`, which looks into named tuples too."""
    hints = getattr(function, "__annotations__", {})
    for name, hint in hints.items():
        if isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields"):
            hints[name] = Annotated[hint, Is[functools.partial(fields_fit, hint)]]
    return _beartype(function)


def fields_fit(kind: type, value: Any) -> bool:
    """Whether the arrays of a named tuple fit their annotations, and the axes of the same call."""
    # In transformations and tree maps, fields hold other things than arrays.
    return all(
        is_bearable(field, hint)
        for name, hint in get_type_hints(kind).items()
        if isinstance(field := getattr(value, name), jax.Array)
    )
