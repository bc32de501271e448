#!/usr/bin/env python3
"""Writes where the project lives into each file that says so.

    .ci/set_address.py https://github.com/OWNER/NAME

The workflows run it before they build, so that the site and the packages of a fork name the
fork. What it changes can be committed too; a second run replaces the address of the first.
"""

import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
_COLAB = "https://colab.research.google.com"
_BADGE = re.compile(r"\A\[!\[Open in Colab\]\(.*\)\n\n")


def main(address: str, root: pathlib.Path = ROOT) -> None:
    match = re.fullmatch(r"(https://github\.com/([\w.-]+)/([\w.-]+?))/?", address)
    if match is None:
        raise SystemExit(f"The address must be https://github.com/OWNER/NAME, got {address!r}.")
    url, owner, name = match.groups()
    _replace(root / "mkdocs.yml", r"(?<=\n  repository: ).*", url)
    _replace(root / "CITATION.cff", r"(\nrepository-code: .*)?\n\Z", f"\nrepository-code: {url}\n")
    links = {
        "Documentation": f"https://{owner}.github.io/{name}/",
        "Repository": url,
        "Changelog": f"{url}/blob/main/CHANGELOG.md",
    }
    _replace(
        root / "pyproject.toml",
        r"(\[project\.urls\]\n(.+\n)*\n)?(?=\[project\.optional-dependencies\])",
        "\n".join(["[project.urls]", *(f'{key} = "{link}"' for key, link in links.items()), "\n"]),
    )
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        _add_badge(path, f"{_COLAB}/github/{owner}/{name}/blob/main/notebooks/{path.name}")


def _replace(path: pathlib.Path, pattern: str, by: str) -> None:
    text, _ = re.subn(pattern, lambda _: by, path.read_text(), count=1)
    path.write_text(text)


def _add_badge(path: pathlib.Path, place: str) -> None:
    """Opens a notebook with a badge for Colab, and with no other."""
    notebook = json.loads(path.read_text())
    first = notebook["cells"][0]
    text = _BADGE.sub("", "".join(first["source"]))
    badge = f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]({place})"
    first["source"] = f"{badge}\n\n{text}".splitlines(keepends=True)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
