"""Recording norms without clipping, to choose a bound from."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _placement, _window
from clipax._core._clip_by import clip_by
from clipax._core._shown import shown
from clipax._core._transformation import injectable
from clipax._core._typing import Array, AxisName, Norm, Norms
from clipax._core._window import WindowState
from clipax.coefficients import unclipped
from clipax.norms import global_norm
from clipax.thresholds import Threshold, per_norm

DEFAULT_QUANTILES = (0.5, 0.9, 0.99)


class Quantiles(NamedTuple):
    """The quantiles that `metrics` gives, of the windows beside it."""

    names: dict[str, optax.EmptyState]
    """The quantiles as keys, which hold nothing."""


@injectable
def measure(
    norm: Norm = global_norm,
    *,
    window_size: int = 1000,
    quantiles: Sequence[float] = DEFAULT_QUANTILES,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Records norms without clipping, to choose a bound from.

    `u <- u`. `clipax.metrics` gives the last norm and quantiles of the last `window_size` finite
    norms. A bound at `norm_q90` would clip one step in ten.

    Args:
      norm: The norm to record: `global_norm`, `leaf_norm`, `block_rms`, ..., or your own.
      window_size: How many norms are remembered, >= 1, at one float each.
      quantiles: The quantiles that `metrics` gives, in (0, 1). It names 0.999 `norm_q99.9`.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` in the structure of the norms, with `max_norm`
      inf and `coefficient` 1. Its `update` accepts a known norm as the extra argument `norm=`.

    Raises:
      ValueError: `window_size` is not an integer >= 1, or `quantiles` are not numbers in (0, 1).

    | updates | result |
    |---|---|
    | any, NaN and inf too | unchanged, bit for bit |
    | a norm that is not finite | recorded as the last norm, kept out of the window |

    Example:
      >>> recorder = measure()
      >>> state = recorder.init(jnp.zeros(2))
      >>> for updates in (jnp.array([3.0, 4.0]), jnp.array([0.0, 1.0])):
      ...     _, state = recorder.update(updates, state)
      >>> metrics(state)["norm"], metrics(state)["norm_q50"]
      (Array(1., dtype=float32), Array(3., dtype=float32))
    """
    _checks.positive_integer(window_size=window_size)
    wanted = _checked(quantiles)
    # The default quantiles are not in the state, so that it has the structure of older states.
    asked = () if tuple(map(float, wanted.names)) == DEFAULT_QUANTILES else (wanted,)

    def remember(norm: Array, state: WindowState, params: Any = None) -> tuple[Array, WindowState]:
        del params
        return norm, _window.push(state, norm)

    window = per_norm(
        optax.GradientTransformation(functools.partial(_window.empty, window_size), remember)
    )

    def init_fn(norms: Norms) -> Any:
        return *window.init(norms), *asked

    def update_fn(norms: Norms, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del params, extra_args
        _, windows = window.update(norms, state[: len(state) - len(asked)])
        bounds = jax.tree.map(lambda norm: _placement.filled_like(norm, jnp.inf), norms)
        return bounds, (*windows, *asked)

    recorder = Threshold(init_fn, update_fn)
    return clip_by(norm, recorder, unclipped, axis_name=axis_name)


def _checked(quantiles: Any) -> Quantiles:
    _checks.static(quantiles=quantiles)
    if isinstance(quantiles, str) or not isinstance(quantiles, Sequence):
        raise ValueError(
            f"quantiles must be a sequence of numbers in (0, 1), got {shown(quantiles)}."
        )
    for place, quantile in enumerate(quantiles):
        _checks.static(**{f"quantiles[{place}]": quantile})
        _checks.scalar(_checks.inside_unit_interval, **{f"quantiles[{place}]": quantile})
    return Quantiles({repr(float(each)): optax.EmptyState() for each in quantiles})
