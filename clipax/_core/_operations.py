"""The operations that reductions use: on one device, then over mapped axes."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    return _largest(*primals, axis, keepdims), jax.jvp(derived, primals, tangents)[1]


def _largest_of(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    return _largest(x, axis, keepdims)


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


SUM = Operation(jnp.sum, jax.lax.psum)
MAX = Operation(_largest_of, _largest_across)
FLOAT_MAX = Operation(functools.partial(jnp.max, initial=0), _MAX_ACROSS)
