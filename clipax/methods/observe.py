"""Recording how a transformation changes the length or the direction of updates."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _leaves, _mapped, _placement, _rules
from clipax._core._powers import root
from clipax._core._products import product_and_square
from clipax._core._range import finite_or_one, in_range
from clipax._core._scaling import scale_updates
from clipax._core._transformation import transformation
from clipax._core._typing import Array, AxisName, Updates
from clipax.norms import global_norm, leaf_norm


class ObserveState(NamedTuple):
    """The effect of the wrapped transformation at its last update."""

    norm_in: Array
    """The global L2 norm of the updates before it."""
    norm_out: Array
    """The global L2 norm of the updates after it."""
    cosine: Array
    """The cosine of the angle between the two, in [-1, 1]."""
    inner_state: Any


def observe(
    inner: optax.GradientTransformation, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Records how a transformation changes the length and direction of updates.

    `cosine = <u, v> / (|u|_2 |v|_2)` for updates `u` that go in and `v` that come out.

    Args:
      inner: Any transformation, a whole chain, or an `optax.MultiSteps`.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      `inner` with its state inside an `ObserveState`, whose `norm_in`, `norm_out` and `cosine` are
      scalars in float32, or float64 where a parameter is.

    Raises:
      ValueError: `inner` is not a transformation.

    | updates | cosine |
    |---|---|
    | zero before or after | 0 |
    | NaN or inf before or after | NaN |

    Example:
      >>> clip = observe(clip_by_value(1.0))
      >>> updates = jnp.array([1.0, 7.0])
      >>> _, state = clip.update(updates, clip.init(updates))
      >>> state.norm_in.round(3), state.norm_out.round(3), state.cosine.round(3)
      (Array(7.071, dtype=float32), Array(1.414, dtype=float32), Array(0.8, dtype=float32))
    """
    inner = _checks.transformation(inner=inner)
    _checks.axis_name(axis_name=axis_name)

    def init_fn(params: Updates) -> ObserveState:
        # Separate arrays, because a buffer can be donated only once.
        zero = _placement.zero_norms(global_norm, params, axis_name=axis_name)
        return ObserveState(zero, zero + 0, zero + 0, inner.init(params))

    def update_fn(
        updates: Updates,
        state: ObserveState,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, ObserveState]:
        # The wrapper has no history of its own, so any other state belongs to `inner`.
        is_own = isinstance(state, ObserveState)
        inner_state = state.inner_state if is_own else state
        new_updates, inner_state = inner.update(updates, inner_state, params, **extra_args)
        norm_in, norm_out, cosine = _compared(updates, new_updates, axis_name)
        dtype = state.norm_in.dtype if is_own else norm_in.dtype
        norm_in, norm_out, cosine = (x.astype(dtype) for x in (norm_in, norm_out, cosine))
        return new_updates, ObserveState(norm_in, norm_out, cosine, inner_state)

    return transformation(init_fn, update_fn)


def _compared(one: Updates, other: Updates, axis_name: AxisName) -> tuple[Array, Array, Array]:
    """The norms of both, and the cosine of the angle between them."""
    norm = functools.partial(global_norm, axis_name=axis_name)
    norm_in = norm(one)
    one, other = _mapped.reduced(one), _mapped.reduced(other)
    left, right = _measured_in_both(one, other), _measured_in_both(other, one)
    if not jax.tree.leaves(left):
        return norm_in, norm(other), jnp.zeros_like(norm_in)
    length = norm_in if _has_the_leaves_of(left, one) else norm(left)
    largest = _largest_computed(right, axis_name)
    # In units near their size, neither squares nor products leave the range of floats.
    width = _leaves.wide_dtype(length.dtype, largest.dtype)
    unit, other_unit = (finite_or_one(size.astype(width)) for size in (length, largest))
    left, right = _in_unit(left, unit), _in_unit(right, other_unit)
    product, square = product_and_square(left, right, axis_name=axis_name)
    other_length = root(square, 2)
    lengths = length / unit * other_length
    cosine = jnp.where(lengths == 0, 0, product / jnp.where(lengths == 0, 1, lengths))
    is_whole = _has_the_leaves_of(right, other)
    return norm_in, in_range(other_length, other_unit) if is_whole else norm(other), cosine


def _measured_in_both(one: Updates, other: Updates) -> Updates:
    def keep(leaf: Any, partner: Any) -> Any:
        return leaf if _leaves.is_measured(leaf) and _leaves.is_measured(partner) else None

    return jax.tree.map(keep, one, other)


def _largest_computed(updates: Updates, axis_name: AxisName) -> Array:
    # A maximum over devices has no derivative, and a unit needs none.
    leaves = leaf_norm(jax.lax.stop_gradient(updates), math.inf, axis_name=axis_name)
    return jnp.max(jnp.stack(jax.tree.leaves(leaves)))


def _has_the_leaves_of(some: Updates, updates: Updates) -> bool:
    return len(jax.tree.leaves(some)) == len(jax.tree.leaves(_rules.only_measured(updates)))


def _in_unit(updates: Updates, unit: Array) -> Updates:
    wide = jax.tree.map(lambda leaf: _leaves.widened(jnp.asarray(leaf), unit.dtype), updates)
    return scale_updates(wide, 1 / unit)
