"""JSON trees: conversion and comparison."""

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def differences(there: Any, here: Any, path: str = "") -> list[str]:
    """Compare two trees.

    Returns:
      For each field that differs, a text such as "model.dim is 128 there and 256 here".
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        absent = "absent"
        return [
            text
            for name in sorted({*there, *here})
            for text in differences(
                there.get(name, absent), here.get(name, absent), f"{path}.{name}" if path else name
            )
        ]
    return [] if there == here else [f"{path} is {there} there and {here} here"]


def as_json(tree: Any) -> Any:
    """Return a tree as read back from a JSON file: tuples are lists, keys are strings."""
    return json.loads(json.dumps(tree))


def plain_json(tree: Any) -> Any:
    """Return a tree without numpy's types; non-finite numbers become null."""
    if isinstance(tree, dict):
        return {str(name): plain_json(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple | np.ndarray):
        return [plain_json(value) for value in tree]
    if isinstance(tree, np.generic):
        tree = tree.item()
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
