"""The leaves of a tree that are measured."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _paths
from clipax._core._typing import Array, Updates


def is_measured(leaf: Any) -> bool:
    """Floating and complex leaves are; integer, bool, float0 and foreign ones are not."""
    if isinstance(leaf, (float, complex)):
        return True
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, np.inexact)


def is_unmeasured(leaf: Any) -> bool:
    return not is_measured(leaf)


def is_none(node: Any) -> bool:
    return node is None


def wide_dtype(*dtypes: Any) -> Any:
    """The real dtype in which leaves of these dtypes are measured and scaled."""
    double = any(np.dtype(dtype) in (np.float64, np.complex128) for dtype in dtypes)
    return jnp.dtype(np.float64 if double else np.float32)


def widened(leaf: Array, *dtypes: Any) -> Array:
    """The leaf in the width of its dtype, or of the given ones; complex if it is."""
    kind = np.complex64 if jnp.iscomplexobj(leaf) else np.float32
    return leaf.astype(np.result_type(wide_dtype(*(dtypes or (leaf.dtype,))), kind))


def in_dtype_of(norm: Array, *values: Any) -> tuple[Array, ...]:
    """Numbers, or arrays that were traced in another dtype, in the dtype of a norm."""
    return tuple(jnp.asarray(value).astype(norm.dtype) for value in values)


def unit_of(largest: Array) -> Array:
    """What to divide by, so that numbers up to the largest are about one at most; 1 for 0."""
    # XLA multiplies by the inverse, which for the largest floats is flushed to zero.
    invertible = jnp.minimum(largest, np.finfo(largest.dtype).max / 16)
    return jnp.where(largest > 0, invertible, 1)


def over(updates: Updates, some: Updates) -> Updates:
    """Some leaves, with None in the place of the others, over the leaves that were there."""
    leaves, treedef = jax.tree.flatten(updates)
    rows = zip(leaves, up_to(treedef, some), strict=True)
    return jax.tree.unflatten(treedef, [old if new is None else new for old, new in rows])


def up_to(treedef: Any, tree: Any) -> list[Any]:
    """The subtrees of a tree where the structure has its leaves."""
    return list(treedef.flatten_up_to(tree))


def map_measured(
    function: Callable[..., Any], updates: Updates, *prefixes: Any, name: str = "coefficients"
) -> Updates:
    """Maps `function(leaf, *values)` over measured leaves of which every prefix says something.

    A leaf without entries stays as it is.
    """
    leaves, treedef = jax.tree.flatten(updates)
    columns = [
        _paths.spread(prefix, updates, is_leaf=is_none, is_optional=is_unmeasured, name=name)
        for prefix in prefixes
    ]
    mapped = [
        function(leaf, *values)
        if is_measured(leaf) and jnp.size(leaf) and not any(value is None for value in values)
        else leaf
        for leaf, *values in zip(leaves, *columns, strict=True)
    ]
    return jax.tree.unflatten(treedef, mapped)


def holds_numbers(leaf: Any) -> bool:
    """Whether it is a number or an array of them: no key, float0, function or string."""
    if isinstance(leaf, (bool, int, float, complex)) or hasattr(leaf, "__jax_array__"):
        return True
    return is_array_of(leaf, np.bool_, np.number)


def is_array_of(leaf: Any, *kinds: Any) -> bool:
    is_array = isinstance(leaf, (jax.Array, np.ndarray, np.generic))
    return is_array and any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds)


def is_float0(leaf: Any) -> bool:
    """Such a leaf has no values, and nothing can be done to it."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0
