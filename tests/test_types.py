"""What a user's type checker makes of clipax, which `py.typed` promises to be typed."""

import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

DATA = pathlib.Path(__file__).resolve().parent / "data"
PROGRAM, BAD_PROGRAM = DATA / "typed_program.py", DATA / "badly_typed_program.py"
# Optax ships no types; a user's configuration says so too.
_MYPY = "[mypy]\nstrict = True\n[mypy-optax.*]\nignore_missing_imports = True\n"

Errors = set[tuple[str, int]]
"""The name of the file and the number of the line of each error."""


def _run(folder: pathlib.Path, module: str, *arguments: str) -> str:
    # Outside of the repository, so that its configuration does not count.
    command = [sys.executable, "-m", module, *arguments, str(PROGRAM), str(BAD_PROGRAM)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def mypy(folder: pathlib.Path) -> Errors:
    (folder / "mypy.ini").write_text(_MYPY)
    output = _run(folder, "mypy")
    found = re.findall(r"^(.*?):(\d+): error: ", output, re.MULTILINE)
    return {(pathlib.Path(path).name, int(line)) for path, line in found}


def pyright(folder: pathlib.Path) -> Errors:
    output = _run(folder, "pyright", "--pythonpath", sys.executable, "--outputjson")
    return {
        (pathlib.Path(each["file"]).name, each["range"]["start"]["line"] + 1)
        for each in json.loads(output)["generalDiagnostics"]
    }


@pytest.mark.slow
@pytest.mark.parametrize("check", [mypy, pyright], ids=lambda check: check.__name__)
def test_type_checkers_take_a_typed_program_and_find_mistakes(
    check: Callable[[pathlib.Path], Errors], tmp_path: pathlib.Path
) -> None:
    pytest.importorskip(check.__name__)
    lines = BAD_PROGRAM.read_text().splitlines()
    mistakes = {
        (BAD_PROGRAM.name, number)
        for number, line in enumerate(lines, start=1)
        if line.endswith("# refused")
    }
    assert len(mistakes) > 5
    assert check(tmp_path) == mistakes


@pytest.mark.slow
def test_a_typed_program_runs() -> None:
    subprocess.run([sys.executable, "-W", "error", str(PROGRAM)], check=True)
