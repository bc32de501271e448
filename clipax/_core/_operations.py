"""The operations that reductions use: on one device, then over mapped axes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _compat, _leaves
from clipax._core._typing import Array


class Operation(NamedTuple):
    local: Callable[..., Array]
    """`(array, axis, keepdims) -> array`."""
    across: Callable[..., Any]
    """`(arrays, mapped axes) -> arrays`."""


# A reduction across devices can drop a NaN from a maximum of floats. As integers, the bits of
# numbers >= 0 have the same order, and NaN comes last.
def _as_bits(x: Array) -> Array:
    integer = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(x, integer) & np.iinfo(integer).max


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _largest(x: Array, axis: tuple[int, ...] | None, keepdims: bool) -> Array:
    bits = jnp.max(_as_bits(x), axis=axis, keepdims=keepdims, initial=0)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@_largest.defjvp
def _largest_jvp(axis: Any, keepdims: bool, primals: Any, tangents: Any) -> Any:
    derived = functools.partial(jnp.max, axis=axis, keepdims=keepdims, initial=0.0)
    same, tangent = jax.jvp(derived, primals, tangents)
    value = jax.lax.stop_gradient(_largest(*primals, axis, keepdims))
    # The value must carry a derivative too: before jax 0.12, second derivatives of a scan ignore
    # this rule and differentiate what it returns.
    return jnp.where(value == same, same, value), tangent


def _largest_of(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    return _largest(x, axis, keepdims)


def _largest_float_of(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    """The same of numbers >= 0 in floats, which a CPU reduces without a copy of their bits."""
    largest = jnp.max(x, axis=axis, keepdims=keepdims, initial=0)
    has_nan = jnp.isnan(jnp.sum(x, axis=axis, keepdims=keepdims))
    return jnp.where(has_nan, jnp.nan, largest)


_MAX_ACROSS: Callable[..., Any] = jax.lax.pmax


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest_across(parts: list[Array], axes: Any) -> list[Array]:
    bits = _MAX_ACROSS([_as_bits(part) for part in parts], axes)
    pairs = zip(bits, parts, strict=True)
    return [jax.lax.bitcast_convert_type(each, part.dtype) for each, part in pairs]


@_largest_across.defjvp
def _largest_across_jvp(axes: Any, primals: Any, tangents: Any) -> Any:
    # A maximum over devices has no derivative, and JAX raises its own error for that here.
    return jax.jvp(lambda parts: _MAX_ACROSS(parts, axes), primals, tangents)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _sum_of_some(x: Array, axis: tuple[int, ...], keepdims: bool) -> Array:
    """A sum of numbers >= 0 that XLA does not hand to its library of reductions."""
    del keepdims
    return jax.lax.reduce(x, np.zeros((), x.dtype), lambda a, b: a + jnp.abs(b), axis)


@_sum_of_some.defjvp
def _sum_of_some_jvp(axis: Any, keepdims: bool, primals: Any, tangents: Any) -> Any:
    del keepdims
    (x,), (tangent,) = primals, tangents
    return jnp.sum(x, axis), jnp.sum(tangent, axis)


def in_rows(x: Array, axes: Any, rows: int) -> tuple[Array, int] | None:
    """Splits one of these axes of a large array on one device, and returns the axis of the rows.

    On a CPU, XLA computes what is reduced in a pass of its own for each operation, or in scalars.
    It unrolls and vectorizes a loop over a few rows, with everything that makes their entries.
    """
    split = next((axis for axis in axes if _is_divided(x.shape[axis], rows)), None)
    is_large = not _leaves.has_at_most(_MOST_IN_ONE_STEP, x)
    if split is None or not is_large or not _compat.is_on_one_device(x):
        return None
    if split == x.ndim - 1:
        # The parts of one row of the array would be short.
        return x.reshape(rows, -1), 0
    shape = (*x.shape[:split], rows, x.shape[split] // rows, *x.shape[split + 1 :])
    return x.reshape(shape), split


def _is_divided(size: Any, rows: int) -> bool:
    # A symbolic size may be divided or not.
    return _leaves.is_known(size) and size % rows == 0


_MOST_IN_ONE_STEP = 2**16 - 1


def _in_two_steps(reduce: Callable[..., Array], first: Callable[..., Array]) -> Any:
    """Reduces a large array to an eighth first, in a loop that computes its entries too."""

    def local(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
        is_whole = axis is None or len(axis) == x.ndim
        rows = in_rows(x, range(x.ndim), 8) if is_whole else None
        if rows is None:
            return reduce(x, axis, keepdims=keepdims)
        array, split = rows
        # Without the barrier, XLA would join both steps.
        return reduce(_compat.optimization_barrier(first(array, (split,), False)))

    return local


def _sum_of_columns_in_steps(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    """A sum that keeps the last axis in two steps, because XLA reads columns one by one."""
    is_of_columns = axis is not None and x.ndim - 1 not in axis
    rows = in_rows(x, axis, 16) if is_of_columns else None
    if rows is not None:
        array, split = rows
        x = _compat.optimization_barrier(_sum_of_some(array, (split,), False))
    return jnp.sum(x, axis, keepdims=keepdims)


def sums_in_one_loop(terms: Sequence[Array], axis: int) -> list[Array]:
    """Sums several arrays of one shape over an axis, with what makes them, in one loop."""

    def add(left: Sequence[Array], right: Sequence[Array]) -> list[Array]:
        return [one + other for one, other in zip(left, right, strict=True)]

    zeros = [np.zeros((), term.dtype) for term in terms]
    return list(jax.lax.reduce(list(terms), zeros, add, (axis,)))


SUM = Operation(jnp.sum, jax.lax.psum)
MAX = Operation(_largest_of, _largest_across)
COLUMNS_IN_STEPS = Operation(_sum_of_columns_in_steps, jax.lax.psum)
"""For numbers >= 0 on a CPU; other sums as they are."""
SUM_IN_STEPS = Operation(_in_two_steps(jnp.sum, _sum_of_some), jax.lax.psum)
"""For numbers >= 0 on a CPU."""
MAX_IN_STEPS = Operation(_in_two_steps(_largest_float_of, _largest), _largest_across)
