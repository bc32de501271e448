"""Opens each notebook with a badge for Colab, once `extra.repository` in mkdocs.yml is known.

Run it as `python notebooks/add_badges.py` after a change there. Without a repository, it takes
the badges away.
"""

import json
import pathlib
import re

import yaml

FOLDER = pathlib.Path(__file__).resolve().parent
_COLAB = "https://colab.research.google.com"
_BADGE = re.compile(r"\A\[!\[Open in Colab\]\(.*\)\n\n")


def repository() -> str | None:
    """Where the project is on GitHub, as the configuration of the site says."""
    config = yaml.safe_load((FOLDER.parent / "mkdocs.yml").read_text())
    return config["extra"].get("repository")


def badge(name: str, repository: str | None) -> str:
    """The first line of a notebook, or nothing."""
    if repository is None:
        return ""
    match = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)/?", repository)
    if match is None:
        raise ValueError(f"repository must be https://github.com/OWNER/NAME, got {repository!r}.")
    place = f"{_COLAB}/github/{match[1]}/blob/main/notebooks/{name}"
    return f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]({place})\n\n"


def with_badge(text: str, name: str, repository: str | None) -> str:
    """The text of a first cell with this badge and no other."""
    return badge(name, repository) + _BADGE.sub("", text)


def main() -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        first = notebook["cells"][0]
        text = with_badge("".join(first["source"]), path.name, repository())
        first["source"] = text.splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
