"""User errors of a command are one line that names its flags; the library names none."""

import ast
import dataclasses
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arl2_jax.config import SamplerConfig
from arl2_jax.errors import ConfigError, DataError, StorageError, UserError, WeightsError
from command_line import is_config_field, name_flags

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("ConfigError('frames=7 is odd')", "error: frames=7 is odd"),
        ("DataError('is odd', field='clips', value=7)", "error: clips=7 is odd"),
        ("StorageError('is full', remedy='free space')", "error: is full; free space"),
        ("WeightsError('are damaged')", "error: are damaged"),
        ("FloatingPointError('the loss is nan')", "error: the loss is nan"),
        ("RuntimeError('RESOURCE_EXHAUSTED: 66 GiB')", "error: the device is out of memory"),
    ],
)
def test_errors_of_users_are_one_line(error, message):
    done = run(error)
    assert done.returncode == 1
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_other_errors_keep_their_trace():
    done = run("RuntimeError('unforeseen')")
    assert done.returncode == 1 and "Traceback" in done.stderr and "unforeseen" in done.stderr


def test_flags_of_the_sampler_are_its_fields():
    given = {
        "method": "euler", "timesteps": (900.0, 20.0), "steps": 7, "shift": 3.0, "guidance": 2.5,
        "context_noise": 0.25,
    }  # fmt: skip
    assert given.keys() == {field.name for field in dataclasses.fields(SamplerConfig)}
    flags = [
        f"--{name}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for name, value in given.items()
    ]
    code = "sampler = command_line.sampler_flags()\ndef main(): print(sampler())\n"
    done = run_code(code, *flags)
    assert done.stdout.strip() == str(SamplerConfig(**given)), done.stderr
    assert run_code(code).stdout.strip() == str(SamplerConfig())
    refused = run_code(code, "--context_noise=1")
    assert refused.stderr.startswith("error: --context_noise=1.0 must be a noise level in")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("stage2.stepz=3", 'config.stage2.stepz; did you mean "steps" instead of "stepz"?'),
        ("train.nothing=3", "config.train.nothing; the fields are those of arl2_jax/config"),
    ],
)
def test_unknown_fields_are_named(flag, message):
    command = ["launch/train.py", "--config=configs/tiny.py", f"--config.{flag}"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"error: unknown config field {message}\n"


def test_kinds_stand_side_by_side():
    for kind in (ConfigError, DataError, StorageError, WeightsError):
        assert kind.__bases__ == (UserError,)


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        (dict(field="model.dim", value=3, remedy="lower it"), "model.dim=3 is odd; lower it"),
        (dict(field="model.dim", value=0), "model.dim=0 is odd"),
        (dict(field="vae"), "vae is odd"),
        (dict(remedy="lower it"), "is odd; lower it"),
        ({}, "is odd"),
    ],
)
def test_an_error_is_made_of_its_parts(parts, line):
    error = pickle.loads(pickle.dumps(ConfigError("is odd", **parts)))  # as a worker sends it
    assert str(error) == line and error.problem == "is odd"
    for name in ("field", "value", "remedy"):
        assert getattr(error, name) == parts.get(name)
    inner = error.within("a.")
    assert type(inner) is ConfigError
    assert str(inner) == (f"a.{line}" if error.field else line)


NAMES = {
    "out": "out",
    "model.dim": "config.model.dim",
    "sampler.steps": "steps",
    "tile": "vae_tile",
}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("is odd", field="model.dim", value=3), "--config.model.dim=3 is odd"),
        (UserError("is missing", field="tile"), "--vae_tile is missing"),
        # What the user has typed is no name, whatever it looks like.
        (UserError("is odd", field="out", value="tile=3"), "--out=tile=3 is odd"),
        (UserError("needs sampler.steps above 3."), "needs --steps above 3."),
        (UserError("is odd", remedy="set tile=4, or model.dim"), "set --vae_tile=4, or --config."),
        # Words, other fields, entries of a field and files keep their names.
        (UserError("no tile is out of model.dims"), "no tile is out of model.dims"),
        (UserError("of a/model.dim and model.dim/x"), "of a/model.dim and model.dim/x"),
        (UserError("in model.dim[0].kind or xtile=3"), "in model.dim[0].kind or xtile=3"),
    ],
)
def test_flags_stand_for_fields_and_arguments(error, line):
    assert line in name_flags(error, NAMES.get)


def test_fields_of_a_configuration_are_known():
    for name in ("model.delta.leak", "train.workdir", "data", "stage2.steps", "phases"):
        assert is_config_field(name)
    for name in ("model.zebra", "manifest.json", "model.dim.real", "zebra", "model.delta.leak.x"):
        assert not is_config_field(name)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            ["train.py", "--config=configs/tiny.py", "--config.model.dim=0"],
            "error: --config.model.dim=0 must be positive",
        ),
        (
            ["train.py", "--config=configs/tiny.py", "--config.data.source=latents"],
            "error: --config.data.path is empty: --config.data.source=latents needs the folder to "
            "read; set it",
        ),
        (
            ["train.py", "--config=configs/tiny.py", "x"],
            "error: unknown argument x; fields are set as --config.NAME=VALUE",
        ),
        (["train.py"], "error: flag --config=None: Flag --config must have a value other than"),
        (
            ["generate.py", "--weights=x", "--guidance=2"],
            "error: --guidance=2.0 needs --method=euler: few-step models carry",
        ),
        (
            ["generate.py", "--weights=x", "--vae_tile=1,2"],
            "error: --vae_tile=1,2 must be two whole numbers of at least 2, such as 30,52",
        ),
        (
            ["prepare_data.py", "--prompts=nowhere.txt", "--weights=x", "--out=y"],
            "error: --prompts=nowhere.txt cannot be read",
        ),
        (
            ["prepare_data.py", "--prompts=nowhere.txt", "--out=y"],
            "error: --weights is missing: the teacher that makes the clips; name it",
        ),
        (
            ["prepare_data.py", "--videos=nowhere", "--vae=x", "--out=y"],
            "/x does not exist; name another file or folder",
        ),
        (["prepare_data.py", "--videos=nowhere", "--out=y"], "error: --vae is missing; name its"),
        (
            ["export_weights.py", "--weights=x", "--out=launch"],
            "/x does not exist; name another file or folder",
        ),
        (
            ["import_weights.py", "--weights=x", "--out=launch"],
            "is there already; name another folder, or pass --overwrite=True",
        ),
        (
            ["rank_layers.py", "--run=nowhere", "--share=2"],
            "error: nowhere is not the folder of a run: config.json is missing; name another",
        ),
    ],
)
def test_commands_name_their_flags(command, line):
    script, *arguments = command
    done = subprocess.run(
        [sys.executable, f"launch/{script}", *arguments], cwd=ROOT, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and line in done.stderr and done.stderr.count("\n") == 1


def test_the_library_knows_no_flag_and_no_command():
    """Messages and docstrings speak of fields and arguments, which every caller has."""
    for path in sorted((ROOT / "arl2_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = re.search(r"--[a-z]|launch/", node.value)
                where = f"{path.relative_to(ROOT)}:{node.lineno}"
                assert not found, f"{where} has {found and found[0]!r}"


def run(error):
    return run_code(f"from arl2_jax.errors import *\ndef main(): raise {error}\n")


def run_code(code, *flags):
    code = f"import command_line\n{code}"
    code += "command_line.run(main, names=command_line.SAMPLER_NAMES)"
    return subprocess.run(
        [sys.executable, "-c", code, *flags],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'launch'}"},
    )
