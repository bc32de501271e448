"""Before a build, `.ci/set_address.py` tells the project where it lives."""

import json
import pathlib
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILES = [
    "mkdocs.yml",
    "CITATION.cff",
    "pyproject.toml",
    *(f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")),
]


@pytest.fixture
def copy(tmp_path):
    return _copy(tmp_path / "copy")


def _copy(root):
    for name in [*FILES, ".ci/set_address.py"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    return root


def _run(root, *arguments):
    command = [sys.executable, root / ".ci" / "set_address.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _texts(root):
    return {name: (root / name).read_text() for name in FILES}


def _first_lines(root):
    """What each notebook opens with."""
    return {
        path.name: "".join(json.loads(path.read_text())["cells"][0]["source"]).split("\n\n")
        for path in (root / "notebooks").glob("*.ipynb")
    }


def test_all_that_names_the_project_has_its_address(copy):
    titles = _first_lines(copy)
    assert _run(copy, "https://github.com/one/clipax/").returncode == 0
    url = "https://github.com/one/clipax"
    assert yaml.safe_load((copy / "mkdocs.yml").read_text())["extra"]["repository"] == url
    assert yaml.safe_load((copy / "CITATION.cff").read_text())["repository-code"] == url
    project = tomllib.loads((copy / "pyproject.toml").read_text())["project"]
    assert project["urls"] == {
        "Documentation": "https://one.github.io/clipax/",
        "Repository": url,
        "Changelog": f"{url}/blob/main/CHANGELOG.md",
    }
    assert project["optional-dependencies"]["plot"]
    places = "https://colab.research.google.com/github/one/clipax/blob/main/notebooks"
    for name, (badge, *text) in _first_lines(copy).items():
        assert badge.startswith("[![Open in Colab](")
        assert badge.endswith(f"]({places}/{name})")
        assert text == titles[name]


def test_a_second_address_replaces_the_first(copy, tmp_path):
    second_copy = _copy(tmp_path / "second")
    _run(copy, "https://github.com/one/clipax")
    _run(copy, "https://github.com/other/name")
    _run(second_copy, "https://github.com/other/name")
    assert _texts(copy) == _texts(second_copy)


@pytest.mark.parametrize("arguments", [["elsewhere"], ["http://github.com/a/b"], []])
def test_what_is_no_address_changes_nothing(copy, arguments):
    run = _run(copy, *arguments)
    assert run.returncode == 1
    assert "https://github.com/OWNER/NAME" in run.stderr
    assert _texts(copy) == _texts(ROOT)


@pytest.mark.parametrize("name", ["docs", "publish"])
def test_what_a_workflow_builds_knows_its_address(name):
    text = (ROOT / ".github" / "workflows" / f"{name}.yml").read_text()
    steps = yaml.safe_load(text)["jobs"]["build"]["steps"]
    runs = [step["run"] for step in steps if "run" in step]
    address = "${{ github.server_url }}/${{ github.repository }}"
    build = next(run for run in runs if run in (".ci/build", "mkdocs build --strict"))
    assert runs.index(f"python .ci/set_address.py {address}") < runs.index(build)
