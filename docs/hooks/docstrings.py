"""Shows docstrings as they are meant: examples as code, references as text, names as links."""

import re
from typing import Any

import griffe
import public

_SPAN = re.compile(r"(?<![\[`])`(?:clipax\.)?(\w+)(\([^`\n]*\))?`(?![\]`])")


def linked(text: str) -> str:
    """The text with a link behind each public name in a code span."""

    def link(match: re.Match[str]) -> str:
        anchor = public.anchors().get(match[1])
        return f"[{match[0]}][{anchor}]" if anchor else match[0]

    return _SPAN.sub(link, text)


def _without_indent(match: re.Match[str]) -> str:
    text = re.sub(r"^ {2}", "", match[2], flags=re.MULTILINE)
    return f"**{match[1]}**\n\n{text}"


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
        text = re.sub(r"^(References):\n((?:  .*\n?|\n)+)", _without_indent, text, flags=re.M)
        # A bound such as `>= 1` at the start of a line is no quotation.
        text = re.sub(r"^( *(?:\*{0,2}\w+: )?)>(?!>>)", r"\1\\>", text, flags=re.M)
        own = obj.name
        obj.docstring.value = "\n".join(
            line if line.lstrip().startswith((">>>", "...")) else _but(own, line)
            for line in text.split("\n")
        )


def _but(own: str, line: str) -> str:
    """The line with its names linked, but for the object's own."""
    return linked(line).replace(f"[`{own}`][{public.anchors().get(own)}]", f"`{own}`")
