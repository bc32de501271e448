"""The leaves of a tree that are measured."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _paths
from clipax._core._typing import Array, Updates


def is_measured(leaf: Any) -> bool:
    """Whether a leaf is floating or complex, not integer, bool, float0 or foreign."""
    if isinstance(leaf, (float, complex)):
        return True
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, np.inexact)


def is_unmeasured(leaf: Any) -> bool:
    return not is_measured(leaf)


def is_none(node: Any) -> bool:
    return node is None


def is_known(size: Any) -> bool:
    """Whether a size is a number, not the symbol of a program that is exported for every size."""
    return isinstance(size, int)


def has_at_most(entries: int, array: Array) -> bool:
    """Whether a leaf is known to be that small."""
    return is_known(array.size) and array.size <= entries


def wide_dtype(*dtypes: Any) -> Any:
    """The real dtype in which leaves of these dtypes are measured and scaled."""
    double = any(np.dtype(dtype) in (np.float64, np.complex128) for dtype in dtypes)
    return jnp.dtype(np.float64 if double else np.float32)


def widened(leaf: Array, *dtypes: Any) -> Array:
    """Casts a leaf to the wide dtype of its own dtype, or of the given ones.

    A complex leaf stays complex.
    """
    return leaf.astype(widened_dtype(leaf.dtype, *dtypes))


def widened_dtype(dtype: Any, *dtypes: Any) -> Any:
    """The dtype to which `widened` casts a leaf of this one."""
    kind = np.complex64 if jnp.issubdtype(dtype, np.complexfloating) else np.float32
    return np.result_type(wide_dtype(*(dtypes or (dtype,))), kind)


def squared_modulus(x: Array) -> Array:
    """The squares of entries, or of the moduli of complex ones."""
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


def in_dtype_of(norm: Array, *values: Any) -> tuple[Array, ...]:
    """Casts numbers, or arrays that were traced in another dtype, to the dtype of a norm."""
    return tuple(jnp.asarray(value).astype(norm.dtype) for value in values)


def unit_of(largest: Array) -> Array:
    """A divisor that brings numbers up to the largest to about one at most; 1 for zero."""
    # XLA may multiply by the inverse instead, and that of the largest floats is flushed to zero.
    invertible = jnp.minimum(largest, np.finfo(largest.dtype).max / 16)
    return jnp.where(largest > 0, invertible, 1)


def over(updates: Updates, some: Updates) -> Updates:
    """Replaces leaves of the updates by those of a tree that has None for the others."""
    leaves, treedef = jax.tree.flatten(updates)
    rows = zip(leaves, up_to(treedef, some), strict=True)
    return jax.tree.unflatten(treedef, [old if new is None else new for old, new in rows])


def up_to(treedef: Any, tree: Any) -> list[Any]:
    """The subtrees of a tree where the structure has its leaves."""
    return list(treedef.flatten_up_to(tree))


def map_measured(
    function: Callable[..., Any], updates: Updates, *prefixes: Any, name: str = "coefficients"
) -> Updates:
    """Maps `function(leaf, *values)` over measured leaves for which every prefix has a value.

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
    """Whether a leaf is a number or an array of numbers, not a key, float0, function or string."""
    if isinstance(leaf, (bool, int, float, complex)) or hasattr(leaf, "__jax_array__"):
        return True
    return is_array_of(leaf, np.bool_, np.number)


def is_array_of(leaf: Any, *kinds: Any) -> bool:
    is_array = isinstance(leaf, (jax.Array, np.ndarray, np.generic))
    return is_array and any(jnp.issubdtype(leaf.dtype, kind) for kind in kinds)


def is_float0(leaf: Any) -> bool:
    """Whether a leaf has the dtype float0, and so no values."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0
