"""Makes a page of each program in `examples/`: its docstring is the text, its code the code."""

import ast
import pathlib
import re
import textwrap
from typing import NamedTuple

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "examples"
INTRO = (
    "clipax is an Optax transformation, so it goes wherever a framework takes an Optax optimizer. "
    "Each page is a whole program that trains and reads the metrics. Tests run each one whose "
    "framework is installed."
)
# Without a table of contents there is room for the code.
WIDE = "---\nhide: [toc]\n---\n\n"


class Example(NamedTuple):
    name: str
    title: str
    text: str
    code: str
    """Without the lines that say what to install where a package is missing."""
    packages: list[str]
    """The modules without which it ends."""
    command: str
    """What installs them."""


def read(path: pathlib.Path) -> Example:
    source = path.read_text()
    docstring, *nodes = ast.parse(source).body
    lines = source.splitlines()
    code, packages, command = lines[docstring.end_lineno :], [], "pip install clipax"
    for node in nodes:
        if isinstance(node, ast.Try):
            imports = ast.unparse(node.body)
            packages = re.findall(r"^(?:import|from) (\w+)", imports, re.MULTILINE)
            command = re.search(r"pip install [^\"]*", ast.get_source_segment(source, node))[0]
            kept = lines[node.body[0].lineno - 1 : node.body[-1].end_lineno]
            start, end = (at - docstring.end_lineno for at in (node.lineno - 1, node.end_lineno))
            code[start:end] = textwrap.dedent("\n".join(kept)).splitlines()
    title, _, text = ast.literal_eval(docstring.value).strip().partition("\n\n")
    return Example(
        path.stem, title.rstrip("."), text, "\n".join(code).strip(), sorted({*packages}), command
    )


def examples() -> list[Example]:
    return sorted(map(read, FOLDER.glob("*.py")), key=lambda each: each.title.lower())


def page(example: Example) -> str:
    return WIDE + "\n\n".join(
        [
            f"# {example.title}",
            example.text,
            f"```python\n{example.code}\n```",
            f"Install with `{example.command}`. In the repository of clipax, the program is "
            f"`examples/{example.name}.py`. [All frameworks](index.md)",
        ]
    )


def overview() -> str:
    def row(example: Example) -> str:
        first = re.split(r"(?<=\.)\s", example.text.replace("\n", " "), maxsplit=1)[0]
        return f"| [{example.title}]({example.name}.md) | {first} |"

    table = "\n".join(["| framework | how it goes |", "|---|---|", *map(row, examples())])
    return WIDE + "\n\n".join(["# Frameworks", INTRO, table])
