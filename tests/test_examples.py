"""The examples run as they stand, learn their task, and remember across blocks; so do pages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Pages whose code runs from top to bottom: a file, and the heading of its part.
PAGES = [("docs/memories.md", ""), ("README.md", "Memories")]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_learns(path, tmp_path):
    done = subprocess.run(
        [sys.executable, path],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", done.stdout)]
    assert losses[-1] < losses[0] / 10
    assert int(re.findall(r"(\d+)% right", done.stdout)[0]) > 90


@pytest.mark.slow
@pytest.mark.parametrize(("page", "heading"), PAGES, ids=lambda name: name or "all")
def test_code_of_a_page_runs(page, heading, tmp_path):
    text = (ROOT / page).read_text()
    part = re.split(r"^## ", text.split(f"\n## {heading}\n")[1], flags=re.M)[0] if heading else text
    code = "import arl2_jax as arl2\n" + "\n".join(re.findall(r"```python\n(.*?)```", part, re.S))
    (tmp_path / "page.py").write_text(code)
    done = subprocess.run(
        [sys.executable, tmp_path / "page.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 2, 4, 6, 12)\n" * 5
