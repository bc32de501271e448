"""Rules that give each leaf a value: masks, axes, names."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _leaves, _paths
from clipax._core._shown import shown
from clipax._core._typing import Axes, LeafRule, Updates


def per_leaf(updates: Updates, **rule: LeafRule) -> list[Any]:
    """The value that `name=rule` gives each leaf, in the order of `jax.tree.leaves`."""
    ((name, value),) = rule.items()
    if is_function(value):
        rows = zip(_paths.of_leaves(updates), jax.tree.leaves(updates), strict=True)
        return [value(path, leaf) if _leaves.is_measured(leaf) else None for path, leaf in rows]
    if is_rule_value(value) and type(value) is not tuple:
        return [value] * len(jax.tree.leaves(updates))
    for pair in _paths.paired_tuples(value, updates, is_rule_value):
        if len(set(pair)) > 1:
            raise ValueError(
                f"{name} has {pair!r}, which is one value for all leaves of a tuple of"
                f" {len(pair)}, but could be meant as one for each. Write a list:"
                f" {list(pair)!r} for one each, {[pair] * len(pair)!r} for the same."
            )
    return _paths.spread(
        value, updates, is_leaf=is_rule_value, is_optional=_leaves.is_unmeasured, name=name
    )


def is_rule_value(node: Any) -> bool:
    """Whether a node of a rule's tree is one value."""
    # A tuple of integers or of names is one value: several axes of one leaf.
    return node is None or (
        type(node) is tuple
        and all(isinstance(item, int | str) and not isinstance(item, bool) for item in node)
    )


def is_function(value: Any) -> bool:
    """Whether a value is to be called; a callable tree of numbers, such as a layer, is not."""
    if not callable(value) or isinstance(value, jax.Array):
        return False
    # An object that is no pytree is its own leaf.
    return isinstance(value, jax.tree_util.Partial) or jax.tree_util.all_leaves([value])


def names_of(value: Any) -> tuple[Any, ...]:
    """The names that a leaf of `axis_name` stands for."""
    return () if value is None else value if isinstance(value, tuple) else (value,)


def wanted(updates: Updates, mask: LeafRule = True) -> list[bool]:
    """Which leaves are measured and not masked out."""
    rows = zip(jax.tree.leaves(updates), per_leaf(updates, mask=mask), strict=True)
    answers = []
    for leaf, is_unmasked in rows:
        measured = _leaves.is_measured(leaf)
        if measured and not isinstance(is_unmasked, bool | np.bool_):
            raise ValueError(
                f"mask must say True or False of each leaf, got {shown(is_unmasked)}."
            )
        answers.append(measured and bool(is_unmasked))
    return answers


def only_measured(updates: Updates, mask: LeafRule = True) -> Updates:
    """The updates with None for every leaf that is not measured or is masked out."""
    leaves, treedef = jax.tree.flatten(updates)
    rows = zip(leaves, wanted(updates, mask), strict=True)
    return jax.tree.unflatten(treedef, [leaf if is_wanted else None for leaf, is_wanted in rows])


def axis_tuple(leaf: Any, **argument: Axes) -> tuple[int, ...]:
    """Axes of a leaf counted from the front, in order."""
    ((name, axes),) = argument.items()
    rank = jnp.ndim(leaf)
    given: tuple[Any, ...] = axes if isinstance(axes, tuple) else (axes,)
    for axis in given:
        if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
            raise ValueError(f"{name} must be an integer, got {axis!r}{_inside(axes)}.")
        if not -rank <= axis < rank:
            raise ValueError(
                f"A leaf of shape {jnp.shape(leaf)} has no axis {axis}, got"
                f" {name}={axes!r}. Give {name} leaf by leaf, as a tree prefix or a function"
                " (path, leaf) -> axes."
            )
    return tuple(sorted({int(axis) % rank for axis in given}))


def _inside(axes: Any) -> str:
    return f" in {axes!r}" if isinstance(axes, tuple) else ""
