"""What goes wrong in a command is told in one line, if its user can mend it."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from arl2_jax.config import SamplerConfig

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("ConfigError('frames=7 is odd')", "error: frames=7 is odd"),
        ("RuntimeError('RESOURCE_EXHAUSTED: 66 GiB')", "error: the device is out of memory"),
    ],
)
def test_errors_of_users_are_one_line(error, told):
    done = run(error)
    assert done.returncode == 1
    assert done.stderr.startswith(told) and done.stderr.count("\n") == 1


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
    assert refused.stderr.startswith("error: sampler.context_noise=1.0 must be a noise level in")
    assert refused.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("stage2.stepz=3", 'config.stage2.stepz; did you mean "steps" instead of "stepz"?'),
        ("train.nothing=3", "config.train.nothing; the fields are those of arl2_jax/config"),
    ],
)
def test_unknown_fields_are_named(flag, told):
    command = ["launch/train.py", "--config=configs/tiny.py", f"--config.{flag}"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == f"error: unknown config field {told}\n"


def run(error):
    return run_code(f"from arl2_jax.config import ConfigError\ndef main(): raise {error}\n")


def run_code(code, *flags):
    code = f"from arl2_jax import command_line\n{code}command_line.run(main)"
    return subprocess.run(
        [sys.executable, "-c", code, *flags],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
