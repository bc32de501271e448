"""A new method is three touches: the skeletons of CONTRIBUTING.md are taken by every suite."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
NAME = "clip_by_largest_entry"
PARTS = ("clipax", "tests", "benchmarks", "conftest.py", "pyproject.toml")
SUITES = ("tests/test_contract.py", "tests/test_contract_state.py", "tests/test_public_api.py")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The project with the method: two files and a line, and no other change."""
    root = tmp_path_factory.mktemp("clipax")
    for part in PARTS:
        if (ROOT / part).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / part, root / part, ignore=ignored)
        else:
            shutil.copy(ROOT / part, root / part)
    method, test = re.findall(
        r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL
    )
    (root / f"clipax/methods/{NAME}.py").write_text(method)
    (root / f"tests/methods/test_{NAME}.py").write_text(test)
    init = root / "clipax/__init__.py"
    text = init.read_text().replace("`clip_by_value`", f"`clip_by_value`, `{NAME}`", 1)
    init.write_text(f"{text}\nfrom clipax.methods.{NAME} import {NAME} as {NAME}\n")
    return root


def run(root: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "CLIPAX_TEST_SHARE": "1/1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_suite_takes_the_skeletons(copy: pathlib.Path) -> None:
    own = (f"tests/methods/test_{NAME}.py", f"clipax/methods/{NAME}.py")
    options = ("-p", "no:cacheprovider", "-p", "no:xdist", "-q", "-m", "slow or not slow")
    said = run(copy, "-m", "pytest", *options, *own, *SUITES, "-k", NAME)
    assert int(re.search(r"(\d+) passed", said)[1]) > 40


def test_the_demonstration_and_the_benchmark_find_a_new_method(copy: pathlib.Path) -> None:
    code = f"""
from clipax._demo._methods import METHODS
from benchmarks.methods import GROUPS
assert {NAME!r} in METHODS
assert any({NAME!r} in group.rows for group in GROUPS.values())
"""
    run(copy, "-c", code)
