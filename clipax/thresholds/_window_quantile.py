"""A quantile of the last norms."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _window
from clipax._core._typing import Array
from clipax._core._window import WindowState
from clipax.thresholds._per_norm import per_norm
from clipax.thresholds._threshold import Threshold


def window_quantile(
    quantile: jax.typing.ArrayLike = 0.1,
    window_size: int = 1000,
    *,
    count_current: bool = True,
    warmup_steps: int = 1,
) -> Threshold:
    """Bounds each norm by a quantile of its last `window_size` values.

    This is the rule of `autoclip`, which documents the arguments in full.

    Args:
      quantile: The share of norms at or under the bound, in (0, 1).
      window_size: How many norms are remembered, >= 1.
      count_current: Whether the current norm belongs to the window.
      warmup_steps: How many norms the window needs before it bounds, >= 1.

    Returns:
      A threshold whose state holds a `WindowState` for each norm.

    Raises:
      ValueError: `quantile` is not in (0, 1), `window_size` or `warmup_steps` not an integer
        >= 1, or `count_current` not a boolean.

    Example:
      >>> threshold = window_quantile(0.5)
      >>> state = threshold.init(jnp.array(0.0))
      >>> for norm in (1.0, 2.0, 9.0):
      ...     max_norm, state = threshold.update(jnp.array(norm), state)
      >>> max_norm
      Array(2., dtype=float32)
    """
    _checks.scalar(_checks.inside_unit_interval, quantile=quantile)
    _checks.positive_integer(window_size=window_size, warmup_steps=warmup_steps)
    _checks.flag(count_current=count_current)

    def update_fn(norm: Array, past: WindowState, params: Any = None) -> tuple[Array, WindowState]:
        del params
        window = _window.push(past, norm)
        history = window if count_current else past
        is_warmed_up = history.value_count >= warmup_steps
        return jnp.where(is_warmed_up, _window.quantile(history, quantile), jnp.inf), window

    init_fn = functools.partial(_window.empty, window_size)
    return per_norm(optax.GradientTransformation(init_fn, update_fn))
