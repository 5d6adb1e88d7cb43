"""Third-party packages that a public name loads, each in a process of its own.

Whoever needs one attention layer must not load data pipelines, video libraries or checkpoints.
"""

import ast
import functools
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import arl2_jax

ROOT = Path(__file__).parents[1]
OWN = {"arl2_jax", "pallas_kernels"}
# Beyond what `from flax import nnx` loads by itself.
NETWORK = {"einops", "jaxtyping"}
WEIGHTS = {*NETWORK, "orbax", "safetensors"}
TEXT = {*WEIGHTS, "ftfy", "tokenizers"}
LOADS = {
    "Generator": NETWORK,
    "HybridAttention": NETWORK,
    "WanTransformer": NETWORK,
    "apply": NETWORK,
    "apply_clip": NETWORK,
    "encode_prompts": TEXT,
    "encode_text": NETWORK,
    "export_params": WEIGHTS,
    "init_memory": NETWORK,
    "init_params": NETWORK,
    "load_params": WEIGHTS,
    "load_wan_codec": NETWORK,
    "model_config": WEIGHTS,
    "param_shapes": NETWORK,
    "rollout": NETWORK,
    "save_params": WEIGHTS,
}
SETTINGS = (
    "Config", "ConfigError", "DataError", "MemorySpec", "ModelConfig", "SamplerConfig",
    "StorageError", "UserError", "WeightsError", "WindowConfig",
)  # fmt: skip
# Distributions whose package has another name.
PACKAGES = {"absl-py": "absl", "orbax-checkpoint": "orbax", "pillow": "PIL"}


@functools.cache
def loaded(statement):
    """Top-level third-party packages in a new process after a statement."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = set(out.stdout.split()) - set(sys.stdlib_module_names) - OWN
    return {name for name in found if not name.startswith("_")}


def declared():
    """Packages that the project depends on by name, in contrast to what those bring along."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[\[<>=~ ;]", line)[0] for group in groups for line in group}
    return {PACKAGES.get(name, name.replace("-", "_")) for name in names}


def test_every_public_name_is_measured():
    assert sorted([*LOADS, *SETTINGS]) == sorted(arl2_jax.__all__)


@pytest.mark.parametrize("name", LOADS)
def test_networks_load_few_packages(name):
    more = loaded(f"from arl2_jax import {name}") - loaded("from flax import nnx")
    if LOADS[name] != NETWORK:  # what Orbax brings along differs between its releases
        more &= declared()
    assert more == LOADS[name]


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_do_not_even_load_jax(name):
    assert loaded(f"from arl2_jax import {name}") == loaded("import arl2_jax") == loaded("pass")


def test_codecs_load_what_networks_do():
    more = loaded("from arl2_jax.codecs import *") - loaded("from flax import nnx")
    assert more == NETWORK


def test_word_vectors_load_numpy_alone():
    more = loaded("from arl2_jax.text import embed_caption") - loaded("pass")
    assert more == {"numpy"}


@pytest.mark.parametrize("package", ["arl2_jax", "arl2_jax.text"])
def test_late_names_are_where_type_checkers_see_them(package):
    module = importlib.import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"{package}.{home}" for name, home in module._HOMES.items()}
    assert sorted(seen) == sorted(module.__all__) and {*seen} <= {*dir(module)}
    for name in seen:
        assert getattr(module, name) is getattr(importlib.import_module(seen[name]), name)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = module.no_such_name
