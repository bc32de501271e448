"""Clippy: no parameter changes by more than a share of itself."""

import functools
import math
from typing import Any

import jax.numpy as jnp
import jax.typing
import optax

from clipax._core import _checks, _kinds, _leaves
from clipax._core._clip_by import ClipState, clip_by
from clipax._core._scaling import in_two
from clipax._core._transformation import transformation
from clipax._core._typing import Array, AxisName, Updates
from clipax.coefficients import hard
from clipax.norms import leaf_norm


def clippy(
    ratio: jax.typing.ArrayLike = 0.5,
    eps: jax.typing.ArrayLike = 0.01,
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf so that no parameter changes by more than a share of itself.

    `u_l <- u_l * min(1, 1 / n_l)` with `n_l = max_i |u_i| / (ratio * |p_i| + eps)`: one entry sets
    the factor of its leaf. Put `clippy` after the optimizer and its learning rate, where the
    updates are the changes: `optax.chain(optax.adagrad(0.1), clipax.clippy())`.

    Args:
      ratio: The share of a parameter by which it may change, >= 0. The paper has 0.5, TensorFlow
        Recommenders 0.1.
      eps: Added to that change, >= 0, in the unit of the parameters, so that a parameter of zero
        can move. The paper has 0.01, TensorFlow Recommenders 1e-7.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose `update` needs `params`. Its state is a `ClipState` with a scalar per
      leaf: `norm` is `n_l` and `max_norm` is 1.

    Raises:
      ValueError: `ratio` or `eps` is not a finite number >= 0; at `update`, `params` is missing,
        lacks a leaf of the updates, or has one of another shape.

    | leaf | result |
    |---|---|
    | no entry above `ratio * abs(p_i) + eps` | the leaf, bit for bit |
    | zero | zeros |
    | `eps = 0`, a parameter of zero, and an update for it | zeros |
    | `eps = 0`, a parameter of zero, and an update of zero | as if the entry were not there |
    | an inf entry | NaN there, zero elsewhere in the leaf; other leaves unharmed |
    | a NaN entry | the leaf all NaN; other leaves unharmed |
    | None, integer, bool, float0 | unchanged, not measured |

    Example:
      >>> clip = clippy(0.5, 0.0)
      >>> params, updates = jnp.array([2.0, 4.0]), jnp.array([2.0, 1.0])
      >>> clip.update(updates, clip.init(params), params)[0]  # at most [1, 2]
      Array([1. , 0.5], dtype=float32)

    References:
      Tang et al., 2023, https://arxiv.org/abs/2302.09178
    """
    _checks.scalar(_checks.finite_non_negative, ratio=ratio, eps=eps)
    largest = functools.partial(leaf_norm, ord=math.inf)
    record = clip_by(largest, 1.0, axis_name=axis_name)

    def relative(update: Any, param: Any) -> Array:
        if jnp.shape(param) != jnp.shape(update):
            raise ValueError(
                f"params must have the shapes of the updates, got {jnp.shape(param)} for"
                f" {jnp.shape(update)}."
            )
        size = jnp.abs(_leaves.widened(jnp.asarray(update)))
        share, least = _leaves.in_dtype_of(size, ratio, eps)
        bound = share * jnp.abs(jnp.asarray(param)).astype(size.dtype) + least
        # An update of zero is within a bound of zero, where the quotient would be 0 / 0.
        is_zero = size == 0
        return jnp.where(is_zero, size, size / jnp.where(is_zero, 1, bound))

    def update_fn(
        updates: Updates,
        state: ClipState | Any,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, ClipState]:
        del extra_args
        if params is None:
            raise ValueError("clippy needs params: call update(updates, state, params).")
        changes = _leaves.map_measured(
            _kinds.once_per_kind(relative), updates, params, name="params"
        )
        _, state = record.update(changes, state)
        return in_two(hard, state.norm, state.max_norm).scale(updates), state

    return transformation(record.init, update_fn)
