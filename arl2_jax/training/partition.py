"""Splitting a parameter tree by path into what a phase trains and what it leaves."""

from collections.abc import Callable

from flax import traverse_util

from arl2_jax.models import Params, is_added
from arl2_jax.parameters import facts_of

Choice = Callable[[str], bool]

# What each phase trains: everything, or what conversion adds without and with low-rank updates.
TRAINED: dict[str, Choice] = {
    "teacher": lambda path: True,
    "stage1": lambda path: is_added(path) and not facts_of(path).low_rank,
    "stage2": is_added,
}


def split_params(params: Params, chosen: Choice) -> tuple[Params, Params]:
    """Return (leaves whose path is chosen, the others), each a nested dict.

    Args:
      params: nested dict.
      chosen: whether a leaf belongs to the first part, by its path "blocks/0-21/delta/phi_q".
    """
    flat = traverse_util.flatten_dict(params, sep="/")
    found = {path: leaf for path, leaf in flat.items() if chosen(path)}
    rest = {path: leaf for path, leaf in flat.items() if path not in found}
    return (
        traverse_util.unflatten_dict(found, sep="/"),
        traverse_util.unflatten_dict(rest, sep="/"),
    )


def merge_params(one: Params, other: Params) -> Params:
    """Return one nested dict with the leaves of both; undoes `split_params`.

    Of a leaf that both have, that of the other is taken.
    """
    flat = traverse_util.flatten_dict(one, sep="/") | traverse_util.flatten_dict(other, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")
