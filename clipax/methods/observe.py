"""Recording how a transformation changes the length or the direction of updates."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _leaves, _placement
from clipax._core._transformation import transformation
from clipax._core._typing import Array, AxisName, Updates
from clipax.norms import global_norm


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
        norm_in = global_norm(updates, axis_name=axis_name)
        norm_out = global_norm(new_updates, axis_name=axis_name)
        cosine = _cosine(updates, new_updates, axis_name)
        dtype = state.norm_in.dtype if is_own else norm_in.dtype
        norm_in, norm_out, cosine = (x.astype(dtype) for x in (norm_in, norm_out, cosine))
        return new_updates, ObserveState(norm_in, norm_out, cosine, inner_state)

    return transformation(init_fn, update_fn)


def _cosine(one: Updates, other: Updates, axis_name: AxisName) -> Array:
    # The law of cosines, `|a - b|^2 = |a|^2 + |b|^2 - 2 <a, b>`, on vectors of about unit length,
    # needs only norms, and norms already handle range and sharding.
    norm = functools.partial(global_norm, axis_name=axis_name)
    one, other = _measured_in_both(one, other), _measured_in_both(other, one)
    (one, length), (other, other_length) = _in_units(one, norm(one)), _in_units(other, norm(other))
    distance = norm(jax.tree.map(jnp.subtract, one, other))
    product = (length * length + other_length * other_length - distance * distance) / 2
    lengths = length * other_length
    return jnp.where(lengths == 0, 0, product / jnp.where(lengths == 0, 1, lengths))


def _measured_in_both(one: Updates, other: Updates) -> Updates:
    def keep(leaf: Any, partner: Any) -> Any:
        return leaf if _leaves.is_measured(leaf) and _leaves.is_measured(partner) else None

    return jax.tree.map(keep, one, other)


def _in_units(updates: Updates, norm: Array) -> tuple[Updates, Array]:
    """The updates divided by a number near their norm, and their norm after that."""
    divisor = _leaves.unit_of(norm)

    def divide(leaf: Any) -> Array:
        wide = _leaves.widened(jnp.asarray(leaf), norm.dtype)
        return wide / divisor.astype(wide.dtype)

    return jax.tree.map(divide, updates), norm / divisor
