"""The public names of clipax, and where on the site each has its place."""

import ast
import functools
import inspect
import pathlib
import types
from typing import Any

import optax

import clipax


def public_names(module: types.ModuleType) -> list[str]:
    """What a module defines, or imports as itself, without an underscore; in its order."""
    names = []
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [each.id for each in node.targets if isinstance(each, ast.Name)]
        elif isinstance(node, ast.ImportFrom):
            names += [each.name for each in node.names if each.asname == each.name]
    return [name for name in names if not name.startswith("_")]


def rooms() -> dict[str, types.ModuleType]:
    """The public modules, `clipax` itself first."""
    modules = {name: getattr(clipax, name) for name in public_names(clipax)}
    return {
        "clipax": clipax,
        **{
            f"clipax.{name}": module
            for name, module in sorted(modules.items())
            if inspect.ismodule(module)
        },
    }


@functools.cache
def methods() -> list[str]:
    """The transformations that have a file of their own."""
    folder = pathlib.Path(clipax.__file__).parent / "methods"
    kind = optax.GradientTransformationExtraArgs
    return [
        path.stem
        for path in sorted(folder.glob("[a-z]*.py"))
        if inspect.signature(getattr(clipax, path.stem)).return_annotation is kind
    ]


@functools.cache
def homes() -> dict[str, list[str]]:
    """The names that the page of each public module documents, every object once."""
    taken = {id(getattr(clipax, name)) for name in methods()}
    found: dict[str, list[str]] = {path: [] for path in rooms()}
    # First where an object is defined, then where it is only offered; `clipax` comes last.
    for is_defined_here in (True, False):
        for path, module in reversed(rooms().items()):
            for name in public_names(module):
                value = getattr(module, name)
                is_here = getattr(value, "__module__", path) == path
                if inspect.ismodule(value) or id(value) in taken or is_here != is_defined_here:
                    continue
                taken.add(id(value))
                found[path].append(name)
    return found


@functools.cache
def anchors() -> dict[str, str]:
    """For each public name its identifier on the site."""
    found = {name: f"clipax.{name}" for name in methods()}
    for path, names in homes().items():
        for name in names:
            found.setdefault(name, f"{path}.{name}")
    return found


def undocumented() -> list[str]:
    """The public modules, functions and classes without a docstring of their own."""
    missing = [path for path, module in rooms().items() if not module.__doc__]
    for path, module in rooms().items():
        for name in public_names(module):
            value: Any = getattr(module, name)
            is_tuple = inspect.isclass(value) and hasattr(value, "_fields")  # its fields say it
            if callable(value) and not is_tuple and not value.__doc__:
                missing.append(f"{path}.{name}")
    return missing


def summary(value: Any) -> str:
    """The first paragraph of a docstring's first line."""
    doc = inspect.getdoc(value) or ""
    first = doc.split("\n\n")[0].replace("\n", " ")
    is_made = inspect.isclass(value) and first.startswith(f"{value.__name__}(")
    return f"A tuple of `{'`, `'.join(value._fields)}`." if is_made else first
