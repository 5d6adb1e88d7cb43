"""Axes have one name and one meaning: annotations use those of the glossary alone."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "arl2_jax").rglob("*.py"))
DTYPES = {"Bool", "Float", "Int", "UInt8"}


def known_names() -> set[str]:
    """First column of the glossary's table of axes."""
    part = (ROOT / "docs" / "glossary.md").read_text().split("\n## Axes\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


def axes(path: Path) -> set[str]:
    """Names of all axes that the annotations of a module mention."""
    shapes = [
        node.slice.elts[1]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in DTYPES
    ]
    return {name.lstrip("*") for shape in shapes for name in ast.literal_eval(shape).split()}


def test_axes_are_those_of_the_glossary():
    known = known_names() | {"batch", "...", "_"} | {str(size) for size in range(10)}
    unknown = {str(path.relative_to(ROOT)): axes(path) - known for path in FILES}
    assert not {path: names for path, names in unknown.items() if names}


def test_every_name_of_the_glossary_is_used():
    assert known_names() <= set().union(*map(axes, FILES))
