"""Which room may use which: read off the source, so that no import can hide in a function."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Room (a package, or a module that stands alone) -> the rooms that it imports: no more, no fewer.
ARROWS = {
    "arl2_jax.errors": set(),
    "arl2_jax.json_trees": set(),
    "arl2_jax.processes": set(),
    "arl2_jax.config": {"errors"},
    "arl2_jax.parameters": {"errors"},
    "arl2_jax.sharding": {"config", "errors", "parameters"},
    "arl2_jax.storage": {"errors"},
    "arl2_jax.nn": {"sharding"},
    "arl2_jax.memory": {"nn", "config", "errors", "sharding", "parameters"},
    "arl2_jax.models": {"memory", "nn", "config", "errors", "parameters"},
    "arl2_jax.diffusion": {"config"},
    "arl2_jax.weights": {
        "models", "config", "errors", "json_trees", "parameters", "processes", "storage",
    },
    "arl2_jax.text": {"models", "config", "errors", "storage", "weights"},
    "arl2_jax.codecs": {"models", "config", "errors", "weights"},
    "arl2_jax.data": {"codecs", "text", "config", "errors", "json_trees", "weights"},
    "arl2_jax.generation": {
        "models", "diffusion", "config", "errors", "storage", "codecs", "data", "text", "weights",
    },
    "arl2_jax.preparation": {
        "generation", "data", "text", "weights", "config", "errors", "storage",
    },
    "arl2_jax.training": {
        "config", "errors", "json_trees", "processes", "sharding", "storage", "parameters",
        "models", "memory", "nn", "diffusion", "generation", "data", "weights",
    },
    "arl2_jax.evaluation": {
        "config", "errors", "json_trees", "sharding", "storage", "models", "diffusion",
        "generation", "codecs", "data", "text", "training", "weights",
    },
}  # fmt: skip
KERNELS = {"arl2_jax.nn", "arl2_jax.memory", "arl2_jax.models"}


def python_files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path, *, module_level_only=False):
    """Full names of all that a file imports; from a package, each name counts as its part."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if module_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_files(room):
    base = ROOT / room.replace(".", "/")
    return sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]


@pytest.mark.parametrize("room", ARROWS)
def test_rooms_use_what_they_may(room):
    """A grant that nobody uses is as wrong as a use that nobody granted."""
    used = {}
    for path in room_files(room):
        for name in imports(path):
            top, _, rest = name.partition(".")
            assert top not in ("launch", "configs", "tests"), f"{path.relative_to(ROOT)}: {name}"
            if top in ("arl2_jax", "pallas_kernels"):
                other = rest.partition(".")[0] if top == "arl2_jax" else top
                used.setdefault(other, f"{path.relative_to(ROOT)}: {name}")
    used.pop(room.split(".")[1], None)
    may = ARROWS[room] | ({"pallas_kernels"} if room in KERNELS else set())
    assert not used.keys() - may, [used[other] for other in used.keys() - may]
    assert not may - used.keys(), f"{room} does not use {may - used.keys()}; remove the arrow"


def test_no_arrow_leads_back():
    graph = {room.split(".")[1]: others for room, others in ARROWS.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_room_is_known():
    found = {
        f"arl2_jax.{path.stem}"
        for path in (ROOT / "arl2_jax").iterdir()
        if not path.name.startswith("_") and (path.is_dir() or path.suffix == ".py")
    }
    assert found == set(ARROWS)


def test_kernels_know_jax_alone():
    allowed = {"jax", "numpy", "pallas_kernels", *sys.stdlib_module_names}
    for path in python_files("pallas_kernels"):
        for name in imports(path):
            assert name.split(".")[0] in allowed, f"{path.relative_to(ROOT)}: {name}"


def test_no_torch_when_imported():
    for path in python_files("arl2_jax", "pallas_kernels", "launch", "configs"):
        tops = {name.split(".")[0] for name in imports(path, module_level_only=True)}
        assert not tops & {"torch", "tensorflow"}, path.relative_to(ROOT)


def test_configs_know_the_config_alone():
    allowed = {"ml_collections", *sys.stdlib_module_names}
    for path in python_files("configs"):
        for name in imports(path):
            known = name.startswith(("arl2_jax.config.", "configs."))
            assert known or name.split(".")[0] in allowed, f"{path.relative_to(ROOT)}: {name}"


def test_launch_goes_through_the_package():
    allowed = {"arl2_jax", "absl", "ml_collections", "command_line", *sys.stdlib_module_names}
    for path in python_files("launch"):
        for name in imports(path):
            assert name.split(".")[0] in allowed, f"{path.relative_to(ROOT)}: {name}"
