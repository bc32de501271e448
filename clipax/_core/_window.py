"""A window over the last values of a scalar, in memory of fixed size."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipax._core import _leaves
from clipax._core._typing import Array

# A share of the mean: a standard deviation below it is the rounding of equal values.
_LEAST_STD = 1e-6

# A rank and a quantile are split into so many parts; products of two stay in range of int32.
_PARTS = 4096


class WindowState(NamedTuple):
    values: Array
    """A ring: the value number `i` stands at `i % window_size`; float."""
    value_count: Array
    """How many values there have been; int32."""


def empty(window_size: int, zero: Array) -> WindowState:
    """A window for values like this zero, and with its sharding."""
    return WindowState(jnp.zeros((window_size,), zero.dtype) + zero, zero.astype(jnp.int32))


def push(window: WindowState, value: Array) -> WindowState:
    """The window with the value in place of its oldest."""
    size = window.values.shape[-1]
    is_oldest = jnp.arange(size, dtype=jnp.int32) == window.value_count % size
    values = jnp.where(is_oldest, value, window.values)
    return WindowState(values, optax.safe_increment(window.value_count))


def quantile(window: WindowState, q: jax.typing.ArrayLike) -> Array:
    """The quantile of the values in the window, interpolated as by `numpy.quantile`.

    Inf where there are none. Leading axes are those of several windows.
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
    # An empty window has inf on both sides, and inf - inf is not a step.
    is_step = high > low
    step = jnp.where(is_step, high - jnp.where(is_step, low, 0.0), 0.0)
    return (low + weight.astype(step.dtype) * step)[..., 0]


def mean_and_std(window: WindowState, *, ddof: int = 0) -> tuple[Array, Array]:
    """The mean and the standard deviation of the values in one window, 0 where there are none.

    `ddof` is what is taken from the count in the divisor of the variance, as in NumPy. The
    deviation is no less than 1e-6 of the mean.
    """
    size = window.values.shape[-1]
    in_use = jnp.arange(size, dtype=jnp.int32) < window.value_count
    values = jnp.where(in_use, window.values, 0)
    # In this unit neither a sum nor a square can overflow or vanish.
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
    """`last * q`, in integer and fraction, to more digits than the dtype has.

    The product with the coarse part of `q` is one of integers, and the rest is small:
    between a usual norm and a spike, a fraction rounded in its fifth digit would show.
    """
    coarse = (jnp if isinstance(q, jax.Array) else np).round(q * _PARTS)
    parts = jnp.asarray(coarse).astype(last.dtype)
    thousands, ones = last // _PARTS, last % _PARTS
    whole = thousands * parts + (ones * parts) // _PARTS
    fraction = ((ones * parts) % _PARTS).astype(dtype) / _PARTS
    fraction += last.astype(dtype) * jnp.asarray(q - coarse / _PARTS).astype(dtype)
    carry = jnp.floor(fraction)
    return whole + carry.astype(last.dtype), fraction - carry
