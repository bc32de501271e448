"""A release has one version, wherever it is named."""

import pathlib
import re

import yaml

import clipax

ROOT = pathlib.Path(__file__).resolve().parent.parent


def test_the_same_version_is_named_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == clipax.__version__
    assert f"version = {{{clipax.__version__}}}" in (ROOT / "README.md").read_text()
    changelog = (ROOT / "CHANGELOG.md").read_text()
    released = re.findall(r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", changelog, re.MULTILINE)
    assert released[0] == clipax.__version__
