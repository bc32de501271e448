"""Running moments of every entry, wide and in full range, in trees like the parameters.

A second moment is kept as its root: the square of neither 1e20 nor 1e-25 is a float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax import _leaves
from clipax._typing import Array, AxisName, Updates
from clipax.norms import global_norm


def zeros(params: Updates) -> Updates:
    """Moments before the first step, complex where a leaf is; None where none is measured."""

    def zero(leaf: Any) -> Array:
        return _leaves.widened(jnp.zeros_like(leaf))

    return jax.tree.map(zero, _leaves.only_measured(params))


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
        leaves = _leaves.up_to(treedef, _leaves.only_measured(updates))
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
    return in_range(update + kept, update)


def in_range(value: Array, source: Array) -> Array:
    """The value, but the largest float where it overflowed though its source is finite."""
    largest = np.finfo(value.dtype).max
    return jnp.where(jnp.isfinite(source), jnp.clip(value, -largest, largest), value)


def all_finite(values: Updates, *, axis_name: AxisName) -> Array:
    """Whether every entry of every leaf is finite, on all shards."""
    # By a sum, which zeros cannot overflow. What is not finite, less itself, is NaN.
    zeros = jax.tree.map(lambda x: x - x, values)
    return jnp.isfinite(global_norm(zeros, 1, axis_name=axis_name))


# Jitted, so that eager calls round as an outer jit does, which fuses product and sum. Where
# the sum nearly cancels, as momentum does, that shows; with two products it would be open
# which of them is fused.
@functools.partial(jax.jit, inline=True)
def mean(old: Array, new: Array, weight: jax.typing.ArrayLike) -> Array:
    """`(1 - weight) * old + weight * new`."""
    weight = jnp.asarray(weight).astype(old.dtype)
    return jnp.where(weight == 1, new, old + weight * (new - old))


def power_mean(
    old: Array, new: Array, weight: jax.typing.ArrayLike, ord: jax.typing.ArrayLike = 2.0
) -> Array:
    """`((1 - weight) * old^ord + weight * new^ord)^(1 / ord)` of numbers >= 0."""
    if not isinstance(ord, jax.Array) and ord == 1:
        return mean(old, new, weight)
    weight = jnp.asarray(weight).astype(old.dtype)
    # By what is added: a rounded factor near one, step after step, would add up.
    kept = old + old * _root_less_one(-weight, ord)
    learned = _power(weight, ord, is_root=True) * new
    large, small = jnp.maximum(kept, learned), jnp.minimum(kept, learned)
    q = small / jnp.where(large > 0, large, 1.0)
    return large + large * _root_less_one(_power(q, ord), ord)


def _root_less_one(x: Array, ord: jax.typing.ArrayLike) -> Array:
    """`(1 + x)^(1 / ord) - 1`, also where x is small."""
    if not isinstance(ord, jax.Array) and ord == 2:
        return x / (1 + jnp.sqrt(1 + x))
    return jnp.expm1(jnp.log1p(x) / jnp.asarray(ord).astype(x.dtype))


def _power(x: Array, ord: jax.typing.ArrayLike, *, is_root: bool = False) -> Array:
    if not isinstance(ord, jax.Array) and ord == 2:
        return jnp.sqrt(x) if is_root else x * x
    exponent = jnp.asarray(1 / ord if is_root else ord).astype(x.dtype)
    # The inner `where` keeps the derivative finite at zero. A NaN is not > 0 and comes through.
    return jnp.where(x > 0, jnp.where(x > 0, x, 1.0) ** exponent, x)


def divided(x: Array, divisor: Array) -> Array:
    """A real or complex array over a real one."""
    if not jnp.iscomplexobj(x):
        return x / divisor
    # A complex quotient would square the divisor.
    return jax.lax.complex(x.real / divisor, x.imag / divisor)
