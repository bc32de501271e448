"""Running moments of every entry, in wide dtypes, in trees like the parameters.

Powers of entries have the range of `optax.scale_by_adam`, which squares the same numbers: in
float32, the square of an entry below 1e-19 is zero. But the square of a larger entry than 1.8e19
is the largest float, because an infinite moment would never be forgotten.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _kinds, _leaves, _placement, _rules
from clipax._core._typing import Array, AxisName, Updates
from clipax.norms import global_norm, leaf_norm

# For a record that is always given its norms. A norm of any order shows their types, and the one
# of order 1 is traced in the shortest time.
given_norm = functools.partial(leaf_norm, ord=1)


def zeros(params: Updates) -> Updates:
    """Moments before the first step: complex for complex leaves, None for unmeasured ones."""
    return jax.tree.map(_placement.zeros_like, _rules.only_measured(params))


def zero_moduli(params: Updates) -> Updates:
    """Moments of moduli before the first step, real for every leaf."""
    return jax.tree.map(lambda zero: jnp.abs(zero), zeros(params))


def zero_norm(params: Updates, *, axis_name: AxisName) -> Array:
    """Zero in the type and place of a global norm."""
    measure = functools.partial(global_norm, ord=1)
    zero: Array = _placement.zero_norms(measure, params, axis_name=axis_name)
    return zero


def widened(updates: Updates, moments: Updates) -> Updates:
    """Casts updates to the structure and dtypes of the moments; a frozen leaf becomes zero."""

    def widen(moment: Array, leaf: Any) -> Array:
        if leaf is None:
            return jnp.zeros_like(moment)
        return _leaves.widened(jnp.asarray(leaf), moment.dtype)

    kept, treedef = jax.tree.flatten(moments)
    try:
        leaves = _leaves.up_to(treedef, _rules.only_measured(updates))
    except ValueError as error:
        raise ValueError(
            f"updates must have the structure that `init` saw, {treedef},"
            f" got {jax.tree.structure(updates)}."
        ) from error
    return jax.tree.unflatten(treedef, map(widen, kept, leaves))


def narrowed(values: Updates, updates: Updates) -> Updates:
    """Casts values to the dtypes of the updates; updates without a value pass through."""

    def narrow(leaf: Any, value: Array | None) -> Any:
        if leaf is None or value is None:
            return leaf
        return value.astype(jnp.asarray(leaf).dtype)

    return jax.tree.map(narrow, updates, values, is_leaf=_leaves.is_none)


def added(update: Array, kept: Array) -> Array:
    """Adds an update and a finite array, so that a finite update gives a finite sum."""
    if jnp.iscomplexobj(update):
        return jax.lax.complex(added(update.real, kept.real), added(update.imag, kept.imag))
    # An infinite sum has no direction, and a clip would turn it into NaN.
    # -0.0 + 0 is 0.0, but -0.0 - 0 keeps its sign, so this is a difference.
    return in_range(update - (0 - kept), update)


def in_range(value: Array, source: Array) -> Array:
    """Replaces a value that overflowed by the largest float where its source is finite."""
    largest = np.finfo(value.dtype).max
    return jnp.where(jnp.isfinite(source), jnp.clip(value, -largest, largest), value)


def all_finite(values: Updates, *, axis_name: AxisName) -> Array:
    """Whether every entry of every leaf is finite, on all shards."""
    # A sum of these cannot overflow, and the norm already reduces it over all shards.
    return jnp.isfinite(global_norm(_kinds.map_alike(zero_or_nan, values), 1, axis_name=axis_name))


def zero_or_nan(x: Array) -> Array:
    """Zero for a finite entry and NaN for another."""
    zero = x - x
    return zero.real + zero.imag if jnp.iscomplexobj(x) else zero


def none_is_nan(norms: Updates, *, axis_name: AxisName) -> Array:
    """Whether no norm of a leaf, which covers all of its shards, is NaN."""
    found = _kinds.map_alike(_one_if_nan, norms)
    # These norms must not be reduced again.
    return global_norm(found, 1, axis_name=None if axis_name is None else ()) == 0


def _one_if_nan(norm: Array) -> Array:
    return jnp.isnan(norm).astype(norm.dtype)


@jax.custom_jvp
def with_derivative_of(value: Array, other: Array) -> Array:
    """Returns the value with the derivative of the other, which it equals up to rounding.

    A value selected by `==` is exact where the formula rounds. But it has the derivative of the
    selected branch alone, which is wrong where the two sides are equal by chance.
    """
    del other
    return value


@with_derivative_of.defjvp
def _with_derivative_of_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return with_derivative_of(*primals), tangents[1]


# Jitted so that eager calls round as under an outer jit, which fuses a product and a sum. The
# difference shows where the sum nearly cancels, as in momentum. The form has one product, because
# with two the compiler would choose which of them to fuse.
@functools.partial(jax.jit, inline=True)
def mean(old: Array, new: Array, weight: jax.typing.ArrayLike) -> Array:
    """`(1 - weight) * old + weight * new`."""
    weight = jnp.asarray(weight).astype(old.dtype)
    moved = old + weight * (new - old)
    return with_derivative_of(jnp.where(weight == 1, new, moved), moved)


def debiased(decay: jax.typing.ArrayLike, count: Array, dtype: Any = float) -> Array:
    """The weight `(1 - decay) / (1 - decay^count)` of the newest value in an unbiased average."""
    weight = jnp.asarray(1 - decay, dtype)
    has_past = weight < 1
    # For a decay near one, `1 - decay^count` loses its digits as a difference of rounded powers,
    # and keeps them by `expm1` and `log1p`. A decay of zero has no logarithm; the inner `where`
    # keeps it out of the derivative.
    logarithm = jnp.log1p(-jnp.where(has_past, weight, 0.5))
    total = jnp.where(has_past, -jnp.expm1(count.astype(weight.dtype) * logarithm), 1)
    return jnp.where(count == 1, 1, weight / total)


def largest_to_square(dtype: Any) -> float:
    """A power of two whose square is finite: 2^63 in float32."""
    return float(2.0 ** (np.finfo(dtype).maxexp // 2 - 1))


def power(x: Array, ord: jax.typing.ArrayLike = 2.0) -> Array:
    """`|x|^ord`, at most the largest float."""
    largest = np.finfo(x.dtype).max
    known = None if isinstance(ord, jax.Array) else float(np.asarray(ord))
    if known == 1:
        return jnp.abs(x)
    square = _leaves.squared_modulus(x)
    if known == 2:
        return jnp.minimum(square, largest)
    (order,) = _leaves.in_dtype_of(square, ord)
    # At zero, the second derivative of any other power is zero or infinite, and is left out.
    at_zero = jnp.where(order == 2, square, 0)
    modulus = jnp.abs(jnp.where(x == 0, 1, x))
    return jnp.where(x == 0, at_zero, jnp.minimum(modulus**order, largest))


def power_root(x: Array, ord: jax.typing.ArrayLike = 2.0) -> Array:
    """`x^(1 / ord)` for `x` >= 0, with a derivative of zero at zero instead of an infinite one."""
    known = None if isinstance(ord, jax.Array) else float(np.asarray(ord))
    if known == 1:
        return x
    if known == 2:
        return root(x)
    (order,) = _leaves.in_dtype_of(x, ord)
    return jnp.where(x > 0, jnp.where(x > 0, x, 1) ** (1 / order), x)


def hypotenuse(one: Array, other: Array) -> Array:
    """`sqrt(one^2 + other^2)` with a derivative of zero at zero."""
    length = jax.lax.stop_gradient(jnp.hypot(one, other))
    unit = jnp.where((length > 0) & jnp.isfinite(length), length, 1)
    return _made_exact(unit * root((one / unit) ** 2 + (other / unit) ** 2), length)


def _made_exact(same: Array, value: Array) -> Array:
    """Returns a constant value with the derivative of a formula that equals it up to rounding."""
    # Floats this near each other have an exact difference, so the sum is exactly the value.
    exact = same + jax.lax.stop_gradient(value - same)
    return jnp.where(jnp.isfinite(value), exact, value)


def root(x: Array) -> Array:
    """`sqrt(x)` for `x` >= 0, with a derivative of zero at zero instead of an infinite one."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), x)


def divided(x: Array, divisor: Array) -> Array:
    """Divides a real or complex array by a real one."""
    if not jnp.iscomplexobj(x):
        return x / divisor
    # A complex quotient would square the divisor, which can overflow.
    return jax.lax.complex(x.real / divisor, x.imag / divisor)
