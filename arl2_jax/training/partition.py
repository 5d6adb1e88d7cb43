"""Split a parameter tree by path into the leaves that a phase trains and the others."""

from collections.abc import Callable

from flax import traverse_util

from arl2_jax.models import Params, is_added
from arl2_jax.parameters import facts_of

Choice = Callable[[str], bool]

# What each phase trains: everything, the additions without low-rank updates, or all additions.
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
    """Return one nested dict with the leaves of both; the inverse of `split_params`.

    Where both have a leaf, that of `other` is taken.
    """
    flat = traverse_util.flatten_dict(one, sep="/") | traverse_util.flatten_dict(other, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")
