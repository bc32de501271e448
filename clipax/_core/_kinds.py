"""Functions that are traced once for all alike leaves."""

from collections.abc import Callable
from typing import Any

import jax

from clipax._core import _leaves


def once_per_kind(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes calls with alike arrays share one trace and one lowering.

    A compiler sees the same program: it puts the function in place of each call.
    """
    shared = jax.jit(function)

    def call(*args: Any) -> Any:
        # Outside of a program, a function that was just made would be compiled for each call.
        is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(args))
        return (shared if is_traced else function)(*args)

    return call


def map_alike(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Maps a function over leaves, and traces it once for all alike ones."""
    return jax.tree.map(once_per_kind(function), tree, *others)


def map_in_rows(function: Callable[..., Any], tree: Any, *others: Any, width: int) -> list[Any]:
    """Maps a function that returns several values, and gives a tree for each of them."""
    leaves, treedef = jax.tree.flatten(tree)
    columns = [_leaves.up_to(treedef, other) for other in others]
    rows = [function(*row) for row in zip(leaves, *columns, strict=True)]
    return [jax.tree.unflatten(treedef, [row[place] for row in rows]) for place in range(width)]
