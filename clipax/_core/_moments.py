"""Running moments of every entry, wide and in full range, in trees like the parameters.

A second moment is kept as its root: the square of neither 1e20 nor 1e-25 is a float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _leaves, _placement, _rules
from clipax._core._typing import Array, AxisName, Updates
from clipax.norms import global_norm


def zeros(params: Updates) -> Updates:
    """Moments before the first step, complex where a leaf is; None where none is measured."""
    return jax.tree.map(_placement.zeros_like, _rules.only_measured(params))


def zero_moduli(params: Updates) -> Updates:
    """Moments of moduli before the first step."""
    return jax.tree.map(lambda zero: jnp.abs(zero), zeros(params))


def widened(updates: Updates, moments: Updates) -> Updates:
    """The measured updates in the structure and width of the moments; a frozen leaf's are zero."""

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
    """The values in the dtypes of the updates, and the updates where there is no value."""

    def narrow(leaf: Any, value: Array | None) -> Any:
        if leaf is None or value is None:
            return leaf
        return value.astype(jnp.asarray(leaf).dtype)

    return jax.tree.map(narrow, updates, values, is_leaf=_leaves.is_none)


def added(update: Array, kept: Array) -> Array:
    """The sum of an update and a finite array; of a finite update, the sum is finite too."""
    if jnp.iscomplexobj(update):
        return jax.lax.complex(added(update.real, kept.real), added(update.imag, kept.imag))
    # An infinite sum has no direction, and a clip would make NaN of it.
    # A sum with zero would lose the sign of -0.0, which a difference keeps.
    return in_range(update - (0 - kept), update)


def in_range(value: Array, source: Array) -> Array:
    """The value, but the largest float where it overflowed though its source is finite."""
    largest = np.finfo(value.dtype).max
    return jnp.where(jnp.isfinite(source), jnp.clip(value, -largest, largest), value)


def all_finite(values: Updates, *, axis_name: AxisName) -> Array:
    """Whether every entry of every leaf is finite, on all shards."""
    # By a sum, which zeros cannot overflow. What is not finite, less itself, is NaN.
    zeros = jax.tree.map(lambda x: x - x, values)
    return jnp.isfinite(global_norm(zeros, 1, axis_name=axis_name))


@jax.custom_jvp
def with_derivative_of(value: Array, other: Array) -> Array:
    """The value, which equals the other up to rounding, with the derivative of the other.

    A choice by `==` is exact where the other is not, but it has the derivative of one branch
    alone, which is the wrong one where the two meet by chance.
    """
    del other
    return value


@with_derivative_of.defjvp
def _with_derivative_of_jvp(
    primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return with_derivative_of(*primals), tangents[1]


# Jitted, so that eager calls round as an outer jit does, which fuses product and sum. Where
# the sum nearly cancels, as momentum does, that shows; with two products it would be open
# which of them is fused.
@functools.partial(jax.jit, inline=True)
def mean(old: Array, new: Array, weight: jax.typing.ArrayLike) -> Array:
    """`(1 - weight) * old + weight * new`."""
    weight = jnp.asarray(weight).astype(old.dtype)
    moved = old + weight * (new - old)
    return with_derivative_of(jnp.where(weight == 1, new, moved), moved)


def debiased(decay: jax.typing.ArrayLike, count: Array, dtype: Any = float) -> Array:
    """`(1 - decay) / (1 - decay^count)`: the newest value's weight in an unbiased average."""
    weight = jnp.asarray(1 - decay, dtype)
    has_past = weight < 1
    # From a decay near one, a difference of rounded powers would keep few digits. A decay of
    # zero has no logarithm: the inner `where` keeps it out of the derivative.
    logarithm = jnp.log1p(-jnp.where(has_past, weight, 0.5))
    total = jnp.where(has_past, -jnp.expm1(count.astype(weight.dtype) * logarithm), 1)
    return jnp.where(count == 1, 1, weight / total)


def power_mean(
    old: Array, new: Array, weight: jax.typing.ArrayLike, ord: jax.typing.ArrayLike = 2.0
) -> Array:
    """`((1 - weight) * old^ord + weight * |new|^ord)^(1 / ord)` of `old` >= 0.

    Where there is no derivative, at a mean of zero or where it is infinite, it is zero.
    """
    known = None if isinstance(ord, jax.Array) else float(np.asarray(ord))
    if known == 1:
        return mean(old, jnp.abs(new), weight)
    return _power_mean(known, old, new, *_leaves.in_dtype_of(old, weight, ord))


# It is differentiated as another program, since here the derivative would divide zero by zero
# where a weight is one, as at the first step, and would not know that a square is smooth.
@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _power_mean(known: float | None, old: Array, new: Array, weight: Array, ord: Array) -> Array:
    order = ord if known is None else known
    # By what is added: a rounded factor near one, step after step, would add up.
    kept = old + old * _root_less_one(-weight, order)
    learned = _power(weight, order, is_root=True) * jnp.abs(new)
    large, small = jnp.maximum(kept, learned), jnp.minimum(kept, learned)
    q = small / jnp.where(large > 0, large, 1.0)
    return large + large * _root_less_one(_power(q, order), order)


@_power_mean.defjvp
def _power_mean_jvp(
    known: float | None, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Array, Array]:
    value = jax.lax.stop_gradient(_power_mean(known, *primals))
    unit = jnp.where((value > 0) & jnp.isfinite(value), value, 1)
    by_powers = functools.partial(_by_powers, known, unit)
    same, dot = jax.jvp(by_powers, primals, tangents)
    # Not the value alone: before jax 0.12, second derivatives of a scan forget this rule.
    return _made_exact(same, value), dot


def _by_powers(
    known: float | None, unit: Array, old: Array, new: Array, weight: Array, ord: Array
) -> Array:
    """The mean of powers as it is written, in a unit near it that is a constant."""
    order = ord if known is None else known
    # What is so much larger than the mean has a weight of zero, and no derivative but by that.
    largest = jax.lax.stop_gradient(
        _power(jnp.full_like(unit, np.finfo(unit.dtype).max / 16), order, is_root=True)
    )

    def power_of(x: Array) -> Array:
        is_far = jnp.abs(x) / unit > largest
        return _power_of_modulus(
            jnp.where(is_far, largest.astype(x.dtype), divided(x, unit)), order
        )

    powers = power_of(old), power_of(new)
    total = (1 - weight) * powers[0] + weight * powers[1]
    positive = jnp.where(total > 0, total, 1)
    return unit * jnp.where(total > 0, _power(positive, order, is_root=True), total)


def _power_of_modulus(x: Array, ord: jax.typing.ArrayLike) -> Array:
    square = x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x
    if not isinstance(ord, jax.Array) and ord == 2:
        return square
    # Of other powers, the second derivative at zero is left out: zero, or infinite.
    at_zero = jnp.where(jnp.asarray(ord) == 2, square, 0)
    modulus = jnp.abs(jnp.where(x == 0, 1, x))
    return jnp.where(x == 0, at_zero, _power(modulus, ord))


def hypotenuse(one: Array, other: Array) -> Array:
    """`sqrt(one^2 + other^2)`, with a derivative of zero at zero."""
    length = jax.lax.stop_gradient(jnp.hypot(one, other))
    unit = jnp.where((length > 0) & jnp.isfinite(length), length, 1)
    return _made_exact(unit * root((one / unit) ** 2 + (other / unit) ** 2), length)


def _made_exact(same: Array, value: Array) -> Array:
    """The value, a constant, by a program that is the same but for rounding: as differentiable."""
    # Of floats so near each other, the difference is exact, and so is the sum.
    exact = same + jax.lax.stop_gradient(value - same)
    return jnp.where(jnp.isfinite(value), exact, value)


def root(x: Array) -> Array:
    """`sqrt(x)` of `x` >= 0, with a derivative of zero at zero, where there is none."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), x)


def _root_less_one(x: Array, ord: jax.typing.ArrayLike) -> Array:
    """`(1 + x)^(1 / ord) - 1`, also where x is small."""
    if not isinstance(ord, jax.Array) and ord == 2:
        return x / (1 + jnp.sqrt(1 + x))
    return jnp.expm1(jnp.log1p(x) / jnp.asarray(ord).astype(x.dtype))


def _power(x: Array, ord: jax.typing.ArrayLike, *, is_root: bool = False) -> Array:
    if not isinstance(ord, jax.Array) and ord == 2:
        return jnp.sqrt(x) if is_root else x * x
    exponent = jnp.asarray(1 / ord if is_root else ord).astype(x.dtype)
    # Zero to a power is zero, also where the logarithm by which it is taken is not finite.
    return jnp.where(x > 0, jnp.where(x > 0, x, 1.0) ** exponent, x)


def divided(x: Array, divisor: Array) -> Array:
    """A real or complex array over a real one."""
    if not jnp.iscomplexobj(x):
        return x / divisor
    # A complex quotient would square the divisor.
    return jax.lax.complex(x.real / divisor, x.imag / divisor)
