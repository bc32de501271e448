"""The site builds: every link leads somewhere, every public name is documented."""

import importlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import types
import typing

import pytest
import yaml

import clipax

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What a page may load: from the site itself. Diagrams, of which there are none, would load more.
_LOADED = re.compile(r"<(?:script|link|img)\b[^>]*(?:src|href)=\"?(https?://[^\">\s]+)")


def module_from(path: pathlib.Path) -> typing.Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_undocumented_public_name_would_end_the_build(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = module_from(ROOT / "docs" / "hooks" / "public.py")
    assert public.undocumented() == []
    path = tmp_path / "room.py"
    path.write_text('"""A room."""\ndef told():\n    """Says."""\ndef untold(): ...\n')
    monkeypatch.setattr(public, "rooms", lambda: {"room": module_from(path)})
    assert public.undocumented() == ["room.untold"]


def test_every_method_can_be_drawn() -> None:
    pictures = module_from(ROOT / "docs" / "hooks" / "pictures.py")
    public = module_from(ROOT / "docs" / "hooks" / "public.py")
    known = {*pictures.OTHERS, *pictures._methods.METHODS}
    assert set(public.methods()) - known == set()


def test_a_method_without_a_picture_would_end_the_build() -> None:
    pictures = module_from(ROOT / "docs" / "hooks" / "pictures.py")
    public = module_from(ROOT / "docs" / "hooks" / "public.py")
    assert pictures.undrawn(public.methods()) == []
    assert pictures.undrawn(["zclip", "no_such_method"]) == ["no_such_method"]


def test_the_cost_of_every_method_is_shown() -> None:
    costs = module_from(ROOT / "docs" / "hooks" / "costs.py")
    names = module_from(ROOT / "docs" / "hooks" / "public.py").methods()
    assert [name for name in names if not costs.section(name)] == []
    # Matrices whose singular values are needed have a tree of their own.
    shown = re.findall(r"^\| \[`(\w+)`\]", costs.table(names), re.MULTILINE)
    assert shown == [name for name in names if name != "clip_by_spectral_norm"]


def test_a_badge_is_text_on_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    monkeypatch.syspath_prepend(ROOT / "docs" / "hooks")
    hook = module_from(ROOT / "docs" / "hooks" / "site.py")
    badge = (
        '<a href="https://colab.research.google.com/a"><img alt="b" src="https://colab.c/d"/></a>'
    )
    page = types.SimpleNamespace(file=types.SimpleNamespace(src_uri="start.md"))
    assert hook.on_page_content(badge, page) == (
        '<a href="https://colab.research.google.com/a">Open in Colab</a>'
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "is_good"),
    [
        ("[there](other.md#here)", True),
        ("[nowhere](none.md)", False),
        ("[no heading](other.md#none)", False),
        ("[absolute](/other.md)", False),
    ],
)
def test_a_broken_link_would_end_the_build(
    text: str, is_good: bool, tmp_path: pathlib.Path
) -> None:
    pytest.importorskip("mkdocs")
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text(text)
    (docs / "other.md").write_text("# Here")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    small = {"site_name": "small", "validation": config["validation"]}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(small))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode == 0) == is_good, done.stderr


def test_the_workflow_builds_strictly() -> None:
    assert "mkdocs build --strict" in (ROOT / ".github" / "workflows" / "docs.yml").read_text()


@pytest.mark.slow
def test_every_framework_has_a_page_with_its_code(site: pathlib.Path) -> None:
    overview = (site / "frameworks" / "index.html").read_text()
    paths = list((ROOT / "examples").glob("*.py"))
    assert len(paths) > 10
    for path in paths:
        assert f'href="{path.stem}.html"' in overview
        page = (site / "frameworks" / f"{path.stem}.html").read_text()
        assert "import clipax" in re.sub("<.*?>", "", page)
        assert "SystemExit" not in page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    for package in ("mkdocs", "mkdocs_jupyter", "mkdocstrings", "material"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.slow
def test_every_method_has_a_page_with_its_picture_and_its_docstring(site: pathlib.Path) -> None:
    folder = pathlib.Path(clipax.__file__).parent / "methods"
    names = [path.stem for path in folder.glob("[a-z]*.py")]
    assert len(names) > 20
    for name in names:
        page = (site / "methods" / f"{name}.html").read_text()
        assert f'src="{name}.png"' in page
        assert f'id="clipax.{name}"' in page
        assert (site / "methods" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_every_public_name_has_an_anchor(site: pathlib.Path) -> None:
    pages = "".join(path.read_text() for path in site.rglob("*.html"))
    anchors = set(re.findall(r'id="clipax\.(?:\w+\.)?(\w+)"', pages))
    names = {name for name in vars(clipax) if name[0] != "_" and name.islower()}
    rooms = {name for name in names if type(getattr(clipax, name)) is type(clipax)}
    assert names - rooms - anchors == set()


@pytest.mark.slow
def test_no_page_loads_anything_from_elsewhere(site: pathlib.Path) -> None:
    for path in site.rglob("*.html"):
        links = set(_LOADED.findall(path.read_text())) - {"https://squidfunk.github.io"}
        assert not links, path


@pytest.mark.slow
def test_no_markdown_is_left_as_it_was_written(site: pathlib.Path) -> None:
    for path in site.rglob("*.html"):
        text = re.sub(r"(?s)<(script|style|pre|code)\b.*?</\1>", "", path.read_text())
        assert not re.search(r"\]\(|\]\[clipax|\\sqrt|^\|", text, re.MULTILINE), path
