"""Splitting a parameter tree by path into what a phase trains and what it leaves."""

import re

from flax import traverse_util

from arl2_jax.models import Params

# What each phase trains: the additions without and with their low-rank updates, or everything.
TRAINED = {
    "teacher": r"",
    "stage1": r"/delta/(?!lora_)",
    "stage2": r"/delta/",
}


def split_params(params: Params, pattern: str) -> tuple[Params, Params]:
    """(leaves whose path contains the regular expression, the others), each a nested dict."""
    flat = traverse_util.flatten_dict(params, sep="/")
    found = {path: leaf for path, leaf in flat.items() if re.search(pattern, f"/{path}")}
    rest = {path: leaf for path, leaf in flat.items() if path not in found}
    return (
        traverse_util.unflatten_dict(found, sep="/"),
        traverse_util.unflatten_dict(rest, sep="/"),
    )


def merge_params(one: Params, other: Params) -> Params:
    """The inverse of `split_params`: one nested dict with the leaves of both."""
    flat = traverse_util.flatten_dict(one, sep="/") | traverse_util.flatten_dict(other, sep="/")
    return traverse_util.unflatten_dict(flat, sep="/")
