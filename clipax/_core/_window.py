"""A window over the last values of a scalar, in memory of fixed size."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipax._core import _leaves
from clipax._core._typing import Array

# The least standard deviation as a share of the mean. Below it, the spread is only rounding.
_LEAST_STD = 1e-6

# The base in which ranks and quantiles are split, so that products of two digits fit int32.
_PARTS = 4096


class WindowState(NamedTuple):
    """The last values of a scalar, such as a norm or a loss."""

    values: Array
    """A ring buffer with value number `i` at index `i % window_size`; float."""
    value_count: Array
    """How many values there have been; int32."""


def empty(window_size: int, zero: Array) -> WindowState:
    """Makes a window for values with the dtype and sharding of this zero."""
    return WindowState(jnp.zeros((window_size,), zero.dtype) + zero, zero.astype(jnp.int32))


def push(window: WindowState, value: Array) -> WindowState:
    """Replaces the oldest value of a window."""
    size = window.values.shape[-1]
    is_oldest = jnp.arange(size, dtype=jnp.int32) == window.value_count % size
    values = jnp.where(is_oldest, value, window.values)
    return WindowState(values, optax.safe_increment(window.value_count))


def quantile(window: WindowState, q: jax.typing.ArrayLike) -> Array:
    """Computes the quantile of the values in a window, interpolated as by `numpy.quantile`.

    An empty window gives inf. Leading axes belong to several windows.
    """
    size = window.values.shape[-1]
    filled = jnp.minimum(window.value_count, size)[..., None]
    in_use = jnp.arange(size, dtype=jnp.int32).reshape((1,) * (filled.ndim - 1) + (size,)) < filled
    ordered = jnp.sort(jnp.where(in_use, window.values, jnp.inf), axis=-1)
    last = jnp.maximum(filled - 1, 0)
    below, weight = _position(last, q, ordered.dtype)
    low, high = (
        jnp.take_along_axis(ordered, jnp.minimum(index, last), axis=-1)
        for index in (below, below + 1)
    )
    # In an empty window both neighbours are inf, and inf - inf would be NaN.
    is_step = high > low
    step = jnp.where(is_step, high - jnp.where(is_step, low, 0.0), 0.0)
    return (low + weight.astype(step.dtype) * step)[..., 0]


def mean_and_std(window: WindowState, *, ddof: int = 0) -> tuple[Array, Array]:
    """Computes the mean and the standard deviation of one window; both are 0 if it is empty.

    The variance divides by the count less `ddof`, as in NumPy. The deviation is at least 1e-6 of
    the mean.
    """
    size = window.values.shape[-1]
    in_use = jnp.arange(size, dtype=jnp.int32) < window.value_count
    values = jnp.where(in_use, window.values, 0)
    # In this unit, no sum or square overflows or underflows.
    unit = _leaves.unit_of(jnp.max(jnp.abs(values)))
    count = jnp.minimum(window.value_count, size).astype(values.dtype)
    mean = jnp.sum(values / unit) / jnp.maximum(count, 1)
    squares = jnp.where(in_use, jnp.square(values / unit - mean), 0)
    variance = jnp.sum(squares) / jnp.maximum(count - ddof, 1)
    # The inner `where` keeps the derivative finite where all values are equal.
    has_spread = variance > 0
    std = jnp.where(has_spread, jnp.sqrt(jnp.where(has_spread, variance, 1)), variance)
    mean = mean * unit
    return mean, jnp.maximum(std * unit, _LEAST_STD * jnp.abs(mean))


def _position(last: Array, q: Any, dtype: Any) -> tuple[Array, Array]:
    """Computes `last * q` as an integer and a fraction, to more digits than the dtype has.

    A fraction rounded in its fifth digit would show where the two neighbours are a usual norm and
    a spike. So the coarse part of `q` is multiplied in integers and only the rest in floats.
    """
    coarse = (jnp if isinstance(q, jax.Array) else np).round(q * _PARTS)
    parts = jnp.asarray(coarse).astype(last.dtype)
    thousands, ones = last // _PARTS, last % _PARTS
    whole = thousands * parts + (ones * parts) // _PARTS
    fraction = ((ones * parts) % _PARTS).astype(dtype) / _PARTS
    fraction += last.astype(dtype) * jnp.asarray(q - coarse / _PARTS).astype(dtype)
    carry = jnp.floor(fraction)
    return whole + carry.astype(last.dtype), fraction - carry
