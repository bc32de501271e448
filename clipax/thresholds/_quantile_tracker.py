"""A running estimate of a quantile of the norms, in the memory of one number."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipax._core import _checks, _choice, _leaves, _patience
from clipax._core._typing import Array
from clipax.thresholds._per_norm import per_norm
from clipax.thresholds._threshold import Threshold


class QuantileState(NamedTuple):
    """The history of one norm under `quantile_tracker`."""

    max_norm: Array
    """The estimate of the quantile; 0 before the first norm."""
    halved_count: Array
    """How many norms in a row were more than twice the estimate; int32."""


def quantile_tracker(
    quantile: jax.typing.ArrayLike = 0.5, *, learning_rate: jax.typing.ArrayLike = 0.2
) -> Threshold:
    """Bounds each norm by an estimate that moves towards a quantile of its values.

    This is the rule of `clip_by_quantile`, which documents the arguments in full.

    Args:
      quantile: The share of norms at or under the bound, in (0, 1).
      learning_rate: How far a step moves the logarithm of the bound, > 0.

    Returns:
      A threshold whose state holds a `QuantileState` for each norm.

    Raises:
      ValueError: `quantile` is not in (0, 1), or `learning_rate` not a finite number > 0.

    Example:
      >>> threshold = quantile_tracker(0.5)
      >>> state = threshold.init(jnp.array(0.0))
      >>> for norm in (1.0, 5.0):
      ...     max_norm, state = threshold.update(jnp.array(norm), state)
      >>> max_norm
      Array(1., dtype=float32)
    """
    _checks.scalar(_checks.inside_unit_interval, quantile=quantile)
    _checks.scalar(_checks.finite_positive, learning_rate=learning_rate)

    def init_fn(zero: Array) -> QuantileState:
        return QuantileState(zero + 0, zero.astype(jnp.int32))

    def update_fn(
        norm: Array, state: QuantileState, params: Any = None
    ) -> tuple[Array, QuantileState]:
        del params
        estimate = state.max_norm
        is_first = estimate == 0
        is_under = (norm <= estimate).astype(norm.dtype)
        rate, share = _leaves.in_dtype_of(norm, learning_rate, quantile)
        factor = jnp.exp(-rate * (is_under - share))
        moved = jnp.minimum(estimate * factor, np.finfo(norm.dtype).max)
        limit = jnp.where(is_first, jnp.inf, estimate)
        count = _patience.count_halved(state.halved_count, norm, limit)
        # Many norms are far above a low quantile, so its estimate is kept for longer.
        most = jnp.maximum(_patience.PATIENCE, 20 / share)
        is_given_up = count.astype(norm.dtype) >= most
        learned = QuantileState(
            jnp.where(is_first | is_given_up, norm, moved), jnp.where(is_given_up, 0, count)
        )
        return limit, _choice.choose(norm > 0, learned, state)

    return per_norm(optax.GradientTransformation(init_fn, update_fn))
