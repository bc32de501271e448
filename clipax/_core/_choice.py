"""A choice between two trees, bit for bit."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _leaves
from clipax._core._typing import Array


def choose(condition: Array, new: Any, old: Any) -> Any:
    """Returns the new tree where the condition holds and the old one elsewhere, bit for bit.

    A leaf that is neither a number nor an array of numbers or keys stays the object that it is.
    """

    def choose_leaf(path: Any, one: Any, other: Any) -> Any:
        if one is other or _leaves.is_float0(other):
            return other
        if _can_be_selected(one) and _can_be_selected(other):
            is_static = type(one) is type(other) and isinstance(one, int)
            # A product with 0 or 1 would not do: 0 * NaN is NaN.
            return other if is_static and one == other else jnp.where(condition, one, other)
        if type(one) is type(other) and np.array_equal(one, other):
            return other
        if isinstance(condition, jax.core.Tracer):
            raise ValueError(
                "While tracing, a step that may be left out can change only numbers, arrays and"
                f" keys, got both {other!r} and {one!r} at {jax.tree_util.keystr(path)!r}."
            )
        return one if condition else other

    return jax.tree_util.tree_map_with_path(choose_leaf, new, old)


def _can_be_selected(leaf: Any) -> bool:
    return _leaves.holds_numbers(leaf) or _leaves.is_array_of(leaf, jax.dtypes.prng_key)
