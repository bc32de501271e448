"""Imports go down the floors only, and methods never import each other."""

import ast
import pathlib

import pytest

import clipax

ROOT = pathlib.Path(clipax.__file__).parent
FLOORS = [
    {"_typing"},
    {
        "_compat",
        "_leaves",
        "_paths",
        "_arguments",
        "_checks",
        "_patience",
        "_preparations",
        "_programs",
        "_transformation",
        "_window",
        "units",
    },
    {
        "_safe_norm",
        "_matrices",
        "_products",
        "_singular",
        "_terms",
        "_walk",
        "_mapped",
        "_spectral",
        "norms",
        "_moments",
        "coefficients",
    },
    {"thresholds", "_grams", "_plans", "_examples"},
    {"_clip_by"},
    {"methods"},
    {"wrappers", "metrics", "apply", "per_example"},
    {"__init__", "__main__"},
]
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.py"))


def floor(module: str) -> int:
    (found,) = (level for level, names in enumerate(FLOORS) if module.split("/")[0] in names)
    return found


def imported(module: str) -> set[str]:
    """The modules of clipax that a module imports."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "clipax":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clipax."):
            names.add(node.module.removeprefix("clipax.").replace(".", "/"))
    return names


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    for other in imported(module):
        same = floor(other) == floor(module)
        assert floor(other) < floor(module) or (same and not module.startswith("methods")), other


def test_no_import_goes_in_a_circle() -> None:
    seen: dict[str, set[str]] = {}

    def below(module: str, path: tuple[str, ...] = ()) -> set[str]:
        assert module not in path, (*path, module)
        if module not in seen:
            others = {other for other in imported(module) if other in MODULES}
            seen[module] = others.union(*(below(other, (*path, module)) for other in others))
        return seen[module]

    for module in MODULES:
        below(module)


def test_private_modules_are_not_public_names() -> None:
    for node in ast.parse((ROOT / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert alias.name == alias.asname
                assert not alias.name.startswith("_")
