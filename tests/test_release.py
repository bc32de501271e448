"""A release: one version everywhere, and workflows that fit the package."""

import pathlib
import re
import tomllib
from typing import Any

import pytest
import yaml

import clipax

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
GITHUB = {path.name: path for path in sorted((ROOT / ".github").rglob("*.yml"))}
WORKFLOWS = ("docs.yml", "publish.yml", "tests.yml")


def _read(name: str) -> dict[Any, Any]:
    return yaml.safe_load(GITHUB[name].read_text())


def test_the_same_version_is_named_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == clipax.__version__
    assert f"version = {{{clipax.__version__}}}" in (ROOT / "README.md").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert released[0] == clipax.__version__


@pytest.mark.parametrize("name", GITHUB)
def test_workflows_and_templates_can_be_read(name: str) -> None:
    assert isinstance(_read(name), dict)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflows_install_extras_that_exist(name: str) -> None:
    steps = [step for job in _read(name)["jobs"].values() for step in job["steps"]]
    commands = " ".join(step.get("run", "") for step in steps)
    extras = {
        each for group in re.findall(r"\.\[([\w,]+)\]", commands) for each in group.split(",")
    }
    assert extras or name == "publish.yml"
    assert extras <= set(PROJECT["optional-dependencies"])


def test_every_supported_python_is_tested() -> None:
    pythons = {
        each.removeprefix("Programming Language :: Python :: ")
        for each in PROJECT["classifiers"]
        if re.search(r":: 3\.\d+$", each)
    }
    assert set(_read("tests.yml")["jobs"]["newest"]["strategy"]["matrix"]["python"]) == pythons


def test_only_the_job_that_publishes_can_prove_who_it_is() -> None:
    jobs = _read("publish.yml")["jobs"]
    assert [name for name, job in jobs.items() if "permissions" in job] == ["publish"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in GITHUB["publish.yml"].read_text()


def test_the_oldest_versions_are_those_that_the_package_names() -> None:
    oldest = (ROOT / ".ci" / "floor.txt").read_text()
    for requirement in PROJECT["dependencies"]:
        assert requirement.replace(">=", "==") in oldest


def test_the_page_on_versions_says_whether_a_name_is_deprecated() -> None:
    modules = (ROOT / "clipax").rglob("*.py")
    warns = any("DeprecationWarning" in path.read_text() for path in modules)
    page = (ROOT / "docs" / "versioning.md").read_text()
    assert ("No name is deprecated now." in page) != warns
