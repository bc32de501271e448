"""Imports go down the floors only, and methods never import each other."""

import ast
import pathlib

import pytest

import clipax

ROOT = pathlib.Path(clipax.__file__).parent
# A package stands for all of its modules that are not named.
FLOORS = [
    {"_core/__init__", "_core/_shown", "_core/_typing", "_spectral/__init__"},
    {
        "_core/_branches",
        "_core/_checks",
        "_core/_choice",
        "_core/_compat",
        "_core/_kinds",
        "_core/_leaves",
        "_core/_mapped",
        "_core/_paths",
        "_core/_norm_trees",
        "_core/_patience",
        "_core/_placement",
        "_core/_rules",
        "_core/_scaling",
        "_core/_select",
        "_core/_transformation",
        "_core/_window",
        "units",
    },
    {
        "_core/_alike",
        "_core/_operations",
        "_core/_powers",
        "_core/_products",
        "_core/_range",
        "_core/_reduction",
        "_core/_stacks",
    },
    {"_core/_moments", "_spectral", "coefficients", "norms"},
    {"thresholds"},
    {"_core/_clip_by", "per_example"},
    {"methods"},
    {"apply", "checks", "metrics", "plot", "states"},
    {"advice"},
    {"__init__", "_demo"},
    {"__main__"},
]
MODULES = sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in ROOT.rglob("*.py"))


def floor(module: str) -> int:
    levels = [
        level
        for name in (module, module.split("/")[0])
        for level, names in enumerate(FLOORS)
        if name in names
    ]
    return levels[0]


def imported(module: str) -> set[str]:
    """The modules of clipax that a module imports."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {"__init__" for alias in node.names if alias.name == "clipax"}
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "clipax":
            continue
        place = (node.module or "").replace(".", "/").removeprefix("clipax").removeprefix("/")
        if place in MODULES:
            names.add(place)
            continue
        for alias in node.names:
            inside = f"{place}/{alias.name}".removeprefix("/")
            may_be = (inside, f"{inside}/__init__", f"{place}/__init__".removeprefix("/"))
            names.add(next(each for each in may_be if each in MODULES))
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


@pytest.mark.parametrize("module", MODULES)
def test_each_module_has_one_idea(module: str) -> None:
    text = (ROOT / f"{module}.py").read_text()
    first_line = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    assert text.count("\n") <= 350
    assert first_line.endswith((".", ":")), first_line
    assert " and " not in first_line.replace("JAX and Optax", ""), first_line
