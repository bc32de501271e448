"""Makes the pages of the site that code can write, and mends the links of those that it cannot.

For every method a page from its docstring, its picture and `docs/background/`; for every public
module a page of the API reference; for every framework a page from `examples/`; the README, the
changelog, CONTRIBUTING and the notebooks from where they lie. The build ends with an error at an
undocumented public name, and at a method without a picture.
"""

import pathlib
import posixpath
import re
from typing import Any

import costs
import docstrings
import frameworks
import pictures
import public
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import clipax

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Files of the repository that are pages of the site, or pictures on them.
PLACES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "SUPPORT.md": "support.md",
    "benchmarks/README.md": "benchmarks-in-full.md",
    "assets/training.png": "assets/training.png",
    **{
        path.relative_to(ROOT).as_posix(): path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    },
}
_SOURCES = {place: source for source, place in PLACES.items()}
_FENCE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_TABLE = re.compile(r"(<table>.*?</table>)", re.DOTALL)
_CODE = re.compile(r"(?<=<code>)[^<]+")
_BADGE = re.compile(r'<img\b[^>]*\bsrc="https://colab[^>]*>')
STREAM = (
    "All methods see the same stream: norms that fall by half, and spikes. The first spike and "
    "the last cover all entries, the second one leaf, the third one entry, and four follow each "
    "other."
)


def on_config(config: MkDocsConfig) -> None:
    """Puts the pages of methods and modules into the navigation."""
    missing = public.undocumented()
    if missing:
        raise PluginError(f"These public names have no docstring: {', '.join(missing)}.")
    undrawn = pictures.undrawn(public.methods())
    if undrawn:
        raise PluginError(f"These methods have no picture: {', '.join(undrawn)}.")
    generated = {
        "Methods": [{name: f"methods/{name}.md"} for name in public.methods()],
        "Frameworks": [
            {each.title: f"frameworks/{each.name}.md"} for each in frameworks.examples()
        ],
        "API reference": [{path: f"api/{path}.md"} for path in public.rooms()],
    }
    if config.extra["repository"]:  # A plain link: `repo_url` would load counts of stars.
        icon = "fontawesome/brands/github"
        config.extra["social"] = [{"icon": icon, "link": config.extra["repository"]}]
    for entry in config.nav:
        for title, pages in entry.items():
            if title in generated:
                pages += generated[title]


@event_priority(100)  # Before mkdocs-jupyter looks for notebooks.
def on_files(files: Files, config: MkDocsConfig) -> None:
    def add(place: str, content: str | bytes) -> None:
        files.append(File.generated(config, place, content=content))

    for source, place in PLACES.items():
        if source == place:  # mkdocs-jupyter takes plain files only.
            files.append(File(place, str(ROOT), config.site_dir, config.use_directory_urls))
        else:
            files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    drawn = pictures.pictures(public.methods(), ROOT / "build" / ".cache" / "pictures")
    for name, (large, small, caption) in drawn.items():
        add(f"methods/{name}.png", large)
        add(f"methods/{name}.small.png", small)
        add(f"methods/{name}.md", _method_page(name, caption))
    add("methods/index.md", _overview(list(drawn)))
    add("frameworks/index.md", frameworks.overview())
    for example in frameworks.examples():
        add(f"frameworks/{example.name}.md", frameworks.page(example))
    add("api/index.md", _api_overview())
    for path in public.rooms():
        add(f"api/{path}.md", _room_page(path))


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Leads links to where files lie on the site, and names to their pages."""
    place = page.file.src_uri
    source = _SOURCES.get(place, f"docs/{place}")

    def lead(match: re.Match[str]) -> str:
        kind, text, link = match.groups()
        target, _, anchor = link.partition("#")
        if not target or re.match(r"\w+:", link):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        there = PLACES.get(path) or _generated(path)
        if not there:
            return text  # It is in the repository and not on the site.
        relative = posixpath.relpath(there, posixpath.dirname(place) or ".")
        return f"{kind}[{text}]({relative}{'#' * bool(anchor)}{anchor})"

    markdown = markdown.replace("<!-- costs -->", costs.table(public.methods()))
    parts = _FENCE.split(markdown)
    for index in range(0, len(parts), 2):
        parts[index] = _LINK.sub(lead, parts[index])
        if not place.startswith(("methods/", "api/")):
            lines = parts[index].split("\n")
            parts[index] = "\n".join(
                line if line.startswith(("#", "    ")) else docstrings.linked(line)
                for line in lines
            )
    return "".join(parts)


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Writes a badge as text, because its picture is elsewhere; lets names in tables break."""
    if page.file.src_uri.startswith("notebooks/"):  # Their code has every word, and is long.
        page.meta["search"] = {"boost": 0.2}

    def break_names(match: re.Match[str]) -> str:
        return re.sub(r"(?<=[\w)])([_.(])(?=\w)", r"\1<wbr>", match[0])

    html = _BADGE.sub("Open in Colab", html)
    parts = _TABLE.split(html)
    parts[1::2] = [_CODE.sub(break_names, part) for part in parts[1::2]]
    return "".join(parts)


def _generated(path: str) -> str:
    """Where a file of the repository is on the site, or the empty string."""
    if path == "examples":
        return "frameworks/index.md"
    if example := re.fullmatch(r"examples/(\w+)\.py", path):
        return f"frameworks/{example[1]}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else ""


def _method_page(name: str, caption: str) -> str:
    uses = [f"* {use[0].upper()}{use[1:]}: {call}" for use, call in _choices(name)]
    background = ROOT / "docs" / "background" / f"{name}.md"
    return "\n\n".join(
        [
            f"# {name}",
            "\n".join(["**Take it to**", "", *map(docstrings.linked, uses)]) if uses else "",
            f"![The norm before and after {name}, step by step]({name}.png)",
            f"*{caption} {STREAM} [All methods](index.md)*",
            f"::: clipax.{name}",
            costs.section(name),
            _lowered(background.read_text()) if background.exists() else "",
        ]
    )


def _choices(name: str) -> list[tuple[str, str]]:
    """The rows of `docs/choose.md` that take a method first."""
    rows = re.findall(r"^\| (.*?) \| (.*?) \|", (ROOT / "docs" / "choose.md").read_text(), re.M)
    return [
        (use, re.sub(r"\]\((?!\w+:)", "](../", call))
        for use, call in rows
        if re.search(rf"`(chain\()?{name}\b", call)
    ]


def _lowered(text: str) -> str:
    """Background on a method as a section of its page."""
    text = re.sub(r"\A# .*\n", "", text)
    return "## Background\n\n" + re.sub(r"^##", "###", text, flags=re.MULTILINE)


def _overview(names: list[str]) -> str:
    shown = [
        f"<figure markdown>\n[![{name}]({name}.small.png)]({name}.md)\n"
        f"<figcaption markdown>[`{name}`]({name}.md)</figcaption>\n</figure>"
        for name in names
    ]
    return frameworks.WIDE + "\n\n".join(
        [
            "# Methods",
            f"{STREAM} Grey is the norm before, blue the norm after, orange the bound where the "
            "method bounds the global norm; a mark at the bottom is a step that was made shorter. "
            "[Choose](../choose.md) says which to take.",
            '<div class="clipax-pictures" markdown>\n\n' + "\n\n".join(shown) + "\n\n</div>",
        ]
    )


def _row(anchor: str, name: str, value: Any) -> str:
    return f"| [`{name}`][{anchor}] | {public.summary(value)} |"


def _api_overview() -> str:
    parts = ["# API reference", "## Methods", _table(public.methods(), clipax, "clipax")]
    for path, names in public.homes().items():
        parts += [f"## [{path}]({path}.md)", _table(names, public.rooms()[path], path)]
    return "\n\n".join(parts)


def _table(names: list[str], module: Any, path: str) -> str:
    rows = [_row(f"{path}.{name}", name, getattr(module, name)) for name in names]
    return "\n".join(["| name | what it does |", "|---|---|", *rows])


def _room_page(path: str) -> str:
    module = public.rooms()[path]
    names = public.homes()[path]
    map_of_clipax = "The methods have [pages of their own](../methods/index.md)."
    intro = map_of_clipax if module is clipax else module.__doc__.split("\n\n")[0]
    return "\n\n".join([f"# {path}", intro, *(f"::: {path}.{name}" for name in names)])
