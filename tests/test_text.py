"""The README and the pages under `docs/`: their code runs, their links lead somewhere."""

import ast
import inspect
import json
import pathlib
import re

import jax
import pytest
import trees

import clipax
from clipax import __main__

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        ROOT / "SUPPORT.md",
        ROOT / "benchmarks" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _blocks(path: pathlib.Path) -> list[str]:
    return [code for language, code in _FENCE.findall(path.read_text()) if language == "python"]


# Each page with code, as a parameter of a test.
_WITH_CODE = [name for name, path in PAGES.items() if _blocks(path)]
_READ_FIRST = {"README.md", "CONTRIBUTING.md", "docs/start.md"}


@pytest.mark.usefixtures("_promotes")
@pytest.mark.parametrize("name", trees.mostly_slow(_WITH_CODE, _READ_FIRST))
def test_every_block_of_a_page_runs(name: str) -> None:
    # As in a script of a user: arrays of different ranks may meet.
    with jax.numpy_rank_promotion("allow"):
        namespace = {"__name__": "page"}
        for number, block in enumerate(_blocks(PAGES[name]), start=1):
            exec(compile(block, f"{name}, block {number}", "exec"), namespace)


def test_pages_have_code_to_run() -> None:
    assert len(_WITH_CODE) > 10
    assert {"README.md", "docs/start.md", "docs/howto/checkpoints.md"} <= set(_WITH_CODE)


def _anchors(path: pathlib.Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", path.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).strip().replace(" ", "-") for each in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_between_files_lead_somewhere(name: str) -> None:
    for link in _LINK.findall(_FENCE.sub("", PAGES[name].read_text())):
        if re.match(r"https?:", link):
            continue
        target, _, anchor = link.partition("#")
        path = (PAGES[name].parent / target).resolve() if target else PAGES[name]
        assert path.exists(), link
        assert path.is_relative_to(ROOT), link
        assert not anchor or anchor in _anchors(path), link


def _calls(text: str) -> list[tuple[str, ast.Call]]:
    """The calls of public functions in the code spans of a page."""
    found = []
    for span in re.findall(r"(?<!`)`([^`\n]+)`", _FENCE.sub("", text)):
        try:
            nodes = list(ast.walk(ast.parse(span.removeprefix("clipax."))))
        except SyntaxError:  # `count -> value`, a command, ...
            continue
        names = {name for name, value in vars(clipax).items() if inspect.isfunction(value)}
        found += [
            (span, node)
            for node in nodes
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in names
        ]
    return found


@pytest.mark.parametrize("name", PAGES)
def test_calls_in_the_text_fit_the_functions(name: str) -> None:
    for span, call in _calls(PAGES[name].read_text()):
        given = [each for each in call.args if getattr(each, "value", 0) is not ...]
        keywords = {each.arg: each.value for each in call.keywords}
        try:
            inspect.signature(getattr(clipax, call.func.id)).bind_partial(*given, **keywords)
        except TypeError as error:
            pytest.fail(f"`{span}`: {error}")


def test_tables_of_methods_call_them() -> None:
    for name, count in {
        "docs/choose.md": 20,
        "docs/howto/migration.md": 20,
        "README.md": 8,
    }.items():
        assert len(_calls(PAGES[name].read_text())) >= count


@pytest.mark.slow
def test_the_page_on_choosing_shows_what_the_command_prints(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (_, command), (_, shown) = _FENCE.findall(PAGES["docs/choose.md"].read_text())[:2]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", [*command.split(), "--output", str(tmp_path)])
    __main__.main()
    assert capsys.readouterr().out.startswith(shown)


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 600


@pytest.mark.parametrize("heading", ["Try it", "Test it"])
def test_the_readme_has_one_command_under_a_heading(heading: str) -> None:
    readme = (ROOT / "README.md").read_text()
    section = re.search(rf"^## {heading}$(.*?)^## ", readme, re.MULTILINE | re.DOTALL)
    assert section
    ((language, command),) = _FENCE.findall(section[1])
    assert language == "sh"
    assert command.startswith("python3 -m venv ")


def test_the_readme_links_to_every_guide() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in (*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "howto").glob("*.md")):
        assert f"({path.relative_to(ROOT).as_posix()}" in readme


# -- Figures ---------------------------------------------------------------------------------


def _results() -> dict[str, dict[str, float]]:
    """The ratios of each table of the benchmark, by the start of its title."""
    results = {}
    for name in ("cpu_step", "cpu_clip_compile_memory_scaling"):
        document = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for table in (*document.get("step", ()), *document.get("clip", ())):
            title = table["title"]
            if not title.endswith("; not donated"):
                ratios = {row["name"]: row["ratio"] for row in table["rows"]}
                # In the table of a step, each row has the limit of its own method.
                limits = {
                    f"limit of {row['name']}": row["ratio"] / row["over_limit"]
                    for row in table["rows"]
                    if row.get("over_limit")
                }
                results[re.match(r"[^:]+: [^,]+, \w+", title)[0]] = ratios | limits
    return results


_GROUPS = {
    "clip_by_global_norm": "global",
    "clip_by_block_rms": "leaf",
    "adaptive_grad_clip": "unit",
}


def test_the_table_of_ratios_is_what_was_measured() -> None:
    text = PAGES["docs/benchmarks.md"].read_text()
    rows = re.findall(r"^\| (?:(\w+) with )?`(\w+)`(?: alone)? \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 10
    results = _results()
    for optimizer, method, cells in rows:
        gradients, clipax, optax, torch, limit = (cell.strip() for cell in cells.split("|"))
        work = f"Step of {optimizer.lower()}" if optimizer else "Clip alone"
        measured = results[f"{work}, {_GROUPS[method]}: {gradients}"]
        assert clipax == f"{measured[method]:.2f}"
        assert optax == f"{measured[f'optax.{method}']:.2f}"
        by_torch = measured.get("torch clip_grad_norm_(foreach)")
        assert torch == ("" if by_torch is None else f"{by_torch:.2f}")
        least = measured["limit: read, then scale" if not optimizer else f"limit of {method}"]
        assert limit == f"{least:.2f}"
