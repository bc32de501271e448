"""One path for each leaf: the same in rules, masks, bounds, states, logs.

A path is what a person would write, "encoder/kernel". Containers that only wrap one value, as
a variable of Flax or a field of coordax does, leave no trace in it: `init` often sees them where
`update` does not. Whether a node is a dict, a list or a class makes no difference either.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.tree_util import FlattenedIndexKey, GetAttrKey

from clipax._core._shown import shown

_SEPARATOR = "/"
# The keys under which boxes hold their one value: boxes of Flax, and classes without names.
_BOXED = (GetAttrKey("value"), GetAttrKey("raw_value"), FlattenedIndexKey(0))


class Position(NamedTuple):
    """A leaf of a tree, or a node without leaves, such as None."""

    path: str
    node: Any
    is_leaf: bool


class _Place(NamedTuple):
    keys: tuple[Any, ...]
    node: Any
    is_leaf: bool
    tuples: tuple[tuple[tuple[Any, ...], int], ...]
    """The tuples that enclose it: the keys and the length of each."""


def positions(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Position]:
    """Every leaf, in the order of `jax.tree.leaves`, and every node without one, with its path."""
    places = list(_places(tree, is_leaf))
    paths = _distinct([place.keys for place in places])
    return [
        Position(path, place.node, place.is_leaf)
        for path, place in zip(paths, places, strict=True)
    ]


def of_leaves(tree: Any) -> list[str]:
    """The path of each leaf, in the order of `jax.tree.leaves`."""
    return [position.path for position in positions(tree) if position.is_leaf]


def leaves(tree: Any) -> dict[str, Any]:
    """Each leaf by its path."""
    return {position.path: position.node for position in positions(tree) if position.is_leaf}


def flat(tree: Any) -> Any:
    """Makes a dict from paths to leaves, or to None for a node without any; keeps a bare leaf."""
    found = positions(tree)
    if [position.path for position in found] == [""]:
        return found[0].node if found[0].is_leaf else {}
    return {position.path: position.node if position.is_leaf else None for position in found}


def by_path(flattened: Any) -> dict[str, Any]:
    """Makes the result of `flat` a dict, even if it is a bare leaf."""
    return flattened if isinstance(flattened, dict) else {"": flattened}


def rebuilt(tree: Any, leaves: Sequence[Any]) -> Any:
    """Puts other leaves into a tree's structure, or into a dict if a class refuses them."""
    try:
        return jax.tree.unflatten(jax.tree.structure(tree), leaves)
    except Exception:  # A class that checks the shapes of its leaves can raise anything.
        return dict(zip(of_leaves(tree), leaves, strict=True))


def spread(
    prefix: Any,
    tree: Any,
    *,
    is_leaf: Callable[[Any], bool] | None = None,
    is_optional: Callable[[Any], bool] = lambda leaf: leaf is None,
    name: str,
) -> list[Any]:
    """The value of a tree prefix for each leaf, in the order of `jax.tree.leaves`.

    A leaf that `is_optional` may be left out, and then has None.
    """
    values = positions(prefix, is_leaf)
    if len(values) == 1 and values[0].path == "" and values[0].is_leaf:
        return [values[0].node] * len(jax.tree.leaves(tree))
    by_path = {value.path: value.node for value in values if value.is_leaf}
    of_tree = positions(tree)
    used: set[str] = set()
    result = []
    for position in of_tree:
        covering = next((up for up in _upwards(position.path) if up in by_path), None)
        if covering is not None:
            used.add(covering)
        elif position.is_leaf and not is_optional(position.node):
            raise _misfit(name, prefix, tree, f"nothing is said of {position.path!r}")
        if position.is_leaf:
            result.append(by_path[covering] if covering is not None else None)
    # A value for the inside of a node without leaves, such as a masked one, may go unused.
    hollow = {each.path for each in of_tree if not each.is_leaf or is_optional(each.node)}
    for path in by_path.keys() - used:
        if hollow.isdisjoint(_upwards(path)):
            raise _misfit(name, prefix, tree, f"the updates have no {path!r}")
    return result


def covered(prefix: Any, tree: Any, *, name: str) -> list[list[int]]:
    """For each leaf of a tree prefix, the positions of the leaves that it covers."""
    leaves, structure = jax.tree.flatten(prefix)
    numbered = jax.tree.unflatten(structure, range(len(leaves)))
    result: list[list[int]] = [[] for _ in leaves]
    for place, number in enumerate(spread(numbered, tree, name=name)):
        result[number].append(place)
    return result


def paired_tuples(prefix: Any, tree: Any, is_leaf: Callable[[Any], bool]) -> Iterator[Any]:
    """The tuples that are one value of a prefix where the tree has a tuple of equal length."""
    lengths = {
        (_joined(keys), length) for place in _places(tree, None) for keys, length in place.tuples
    }
    for value in positions(prefix, is_leaf):
        if isinstance(value.node, tuple) and (value.path, len(value.node)) in lengths:
            yield value.node


def _misfit(name: str, prefix: Any, tree: Any, why: str) -> ValueError:
    return ValueError(
        f"{name} must be one value or a tree prefix of the updates, got {shown(prefix)} for the"
        f" structure {jax.tree.structure(tree)}: {why}."
    )


def _places(
    node: Any,
    is_leaf: Callable[[Any], bool] | None,
    keys: tuple[Any, ...] = (),
    tuples: tuple[Any, ...] = (),
) -> Iterator[_Place]:
    if is_leaf is not None and is_leaf(node):
        yield _Place(keys, node, True, tuples)
        return
    children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda each: each is not node)
    if not children:
        yield _Place(keys, node, False, tuples)
        return
    if type(node) is tuple:
        tuples = (*tuples, (keys, len(node)))
    for key, child in children:
        if not key:
            yield _Place(keys, child, True, tuples)
            return
        is_box = len(children) == 1 and key[0] in _BOXED
        yield from _places(child, is_leaf, keys if is_box else keys + key, tuples)


def _joined(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=_SEPARATOR)


def _distinct(keys: list[tuple[Any, ...]]) -> list[str]:
    """The paths, in JAX's own notation where two would otherwise be the same."""
    paths = [_joined(each) for each in keys]
    number = Counter(paths)
    return [
        path if number[path] == 1 else jax.tree_util.keystr(each)
        for path, each in zip(paths, keys, strict=True)
    ]


def _upwards(path: str) -> Iterator[str]:
    """The path and those above it, the longest first."""
    while path:
        yield path
        path = path.rpartition(_SEPARATOR)[0]
    yield ""
