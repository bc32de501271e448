"""The mean of the last norms, plus a multiple of their standard deviation."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _leaves, _window
from clipax._core._typing import Array
from clipax._core._window import WindowState
from clipax.thresholds._per_norm import per_norm
from clipax.thresholds._threshold import Threshold


def mean_and_deviation(
    z_max: jax.typing.ArrayLike = 3.0,
    window_size: int = 128,
    *,
    warmup_steps: int | None = None,
) -> Threshold:
    """Bounds each norm by the mean of its past plus `z_max` standard deviations.

    This is the rule of `clip_by_mean_std`, which documents the arguments in full.

    Args:
      z_max: How many standard deviations above the mean a norm may lie, > 0.
      window_size: How many norms are remembered, >= 1.
      warmup_steps: How many norms the window needs before it bounds, >= 1. None is half of the
        window, and at least 2.

    Returns:
      A threshold whose state holds a `WindowState` for each norm.

    Raises:
      ValueError: `z_max` is not a finite number > 0, or `window_size` or `warmup_steps` not an
        integer >= 1.

    Example:
      >>> threshold = mean_and_deviation(3.0, window_size=4)
      >>> state = threshold.init(jnp.array(0.0))
      >>> for norm in (1.0, 3.0, 10.0):
      ...     max_norm, state = threshold.update(jnp.array(norm), state)
      >>> max_norm
      Array(5., dtype=float32)
    """
    _checks.scalar(_checks.finite_positive, z_max=z_max)
    _checks.positive_integer(window_size=window_size)
    needed = _checks.warmup(warmup_steps, window_size)
    if warmup_steps is None:
        needed = max(2, needed)

    def update_fn(norm: Array, past: WindowState, params: Any = None) -> tuple[Array, WindowState]:
        del params
        mean, std = _window.mean_and_std(past)
        (times,) = _leaves.in_dtype_of(norm, z_max)
        limit = mean + times * std
        return jnp.where(past.value_count >= needed, limit, jnp.inf), _window.push(past, norm)

    init_fn = functools.partial(_window.empty, window_size)
    return per_norm(optax.GradientTransformation(init_fn, update_fn))
