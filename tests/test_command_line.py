"""What goes wrong in a command is told in one line, if its user can mend it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def run(error):
    code = "from arl2_jax import command_line; from arl2_jax.config import ConfigError\n"
    code += f"def main(): raise {error}\n"
    return subprocess.run(
        [sys.executable, "-c", code + "command_line.run(main)"],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
