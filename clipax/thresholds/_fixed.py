"""Bounds that no history changes: numbers, schedules, trees of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _kinds, _paths, _placement
from clipax._core._typing import Array, Bound, Norms
from clipax.thresholds._threshold import Threshold


class FixedState(NamedTuple):
    """The count of a bound with a schedule."""

    step_count: Array
    """The number of updates so far; int32."""


def fixed(max_norm: Bound) -> Threshold:
    """Bounds norms by a number, a schedule `count -> value`, or a tree prefix of them.

    Args:
      max_norm: The bound, >= 0. `inf` never clips. A traced value cannot be checked; if it is
        negative, it counts as zero.

    Returns:
      A threshold. With a schedule its state counts the updates; otherwise it holds nothing.

    Raises:
      ValueError: A number in `max_norm` is negative, NaN, boolean, None or a string; at
        `init` and `update`, the prefix does not fit.

    Example:
      >>> threshold = fixed(2.0)
      >>> norms = {"w": jnp.array(5.0), "b": jnp.array(1.0)}
      >>> threshold.update(norms, threshold.init(norms))[0]
      {'b': Array(2., dtype=float32), 'w': Array(2., dtype=float32)}
    """
    return bounded(_checks.non_negative, max_norm=max_norm)


def bounded(
    requirement: Callable[..., None], *, is_lower: bool = False, **bound: Bound
) -> Threshold:
    """Makes a threshold like `fixed`, for an argument with another name and requirement.

    With `is_lower`, the argument is a lower bound, <= 0, whose modulus bounds the norms.
    """
    ((name, value),) = bound.items()
    _checks.bound(requirement, **bound)
    leaves = jax.tree.leaves(value, is_leaf=_checks.is_bound_leaf)
    is_scheduled = any(map(_checks.is_schedule, leaves))

    def init_fn(norms: Norms) -> Any:
        step_count = jnp.zeros((), jnp.int32)
        # Refuses a prefix that does not fit.
        jax.eval_shape(bounds_at, step_count, norms)
        return FixedState(step_count) if is_scheduled else optax.EmptyState()

    def update_fn(norms: Norms, state: Any, params: Norms = None, **extra_args: Any) -> Any:
        del params, extra_args
        if not is_scheduled:
            return bounds_at(None, norms), state
        count = state.step_count
        return bounds_at(count, norms), FixedState(optax.safe_increment(count))

    def bounds_at(count: Array | None, norms: Norms) -> Norms:
        bounds = _paths.spread(value, norms, is_leaf=_checks.is_bound_leaf, name=name)
        sizes, treedef = jax.tree.flatten(norms)
        fill = _kinds.once_per_kind(_placement.filled_like)
        known: dict[Any, Array] = {}
        result = []
        for norm, leaf in zip(sizes, bounds, strict=True):
            key = id(leaf), norm.dtype
            if key not in known:
                known[key] = bound_of(norm.dtype, leaf, count)
            _must_fit(known[key], norm, name)
            result.append(fill(norm, known[key]))
        return jax.tree.unflatten(treedef, result)

    def bound_of(dtype: Any, leaf: Any, count: Array | None) -> Array:
        if _checks.is_schedule(leaf):
            # A schedule of Optax promotes its integer count to a float.
            with jax.numpy_dtype_promotion("standard"):
                leaf = leaf(count)
            _checks.scheduled(**{name: leaf})
        return not_negative(jnp.asarray(-leaf if is_lower else leaf).astype(dtype))

    return Threshold(init_fn, update_fn)


def _must_fit(bound: Array, norm: Array, name: str) -> None:
    if bound.ndim and jnp.broadcast_shapes(bound.shape, norm.shape) != norm.shape:
        raise ValueError(
            f"{name} of shape {bound.shape} does not fit norms of shape {norm.shape}. Give one"
            " number, or an array that broadcasts to the norms."
        )


def not_negative(bound: Array) -> Array:
    """Replaces a negative bound, which only a traced one can be, by zero.

    It would reverse the updates.
    """
    # A maximum would have half of the derivative at zero.
    return jnp.where(bound < 0, 0, bound)
