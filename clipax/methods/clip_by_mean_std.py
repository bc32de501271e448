"""Bounding norms by the mean of the last ones plus some standard deviations."""

import jax
import optax

from clipax._core._clip_by import clip_by
from clipax._core._transformation import injectable
from clipax._core._typing import AxisName, Bound, LeafRule, Norm
from clipax.norms import global_norm
from clipax.thresholds import capped, mean_and_deviation


@injectable
def clip_by_mean_std(
    z_max: jax.typing.ArrayLike = 3.0,
    window_size: int = 128,
    *,
    norm: Norm = global_norm,
    warmup_steps: int | None = None,
    max_norm: Bound | None = None,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the norm by the mean of the last norms plus `z_max` standard deviations.

    `max_norm_t = mean + z_max * max(std, 1e-6 * mean)` over the window of
    `norm_{t-W}, ..., norm_{t-1}` with `W = window_size` and the population's `std`.

    The history learns raw norms, before clipping, and the current norm does not count. After any
    finite norms, half of a usual norm passes within 5 steps, or for a smaller `z_max` within half
    a window and two steps.

    Args:
      z_max: How many standard deviations above the mean a norm may lie, > 0. Levanter has 3.
      window_size: How many norms are remembered, >= 1, at one float each. Levanter has 128.
      norm: The norm that its own history bounds: `global_norm`, `leaf_norm` (one history per
        leaf), `block_rms`, ..., or your own.
      warmup_steps: How many norms the history needs before it bounds, >= 1. Until then, only
        `max_norm` does. None is half the window, and at least 2, as in Levanter.
      max_norm: A cap on the bound, > 0, in the forms that `fixed` takes. None sets no cap.
      mask: As in `clip_by_global_norm`.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` in the structure of the norms. Its threshold
      holds the window, of which `metrics` gives the quantiles 0.5, 0.9 and 0.99.

    Raises:
      ValueError: `z_max` is not a finite number > 0, `window_size` or `warmup_steps` not an
        integer >= 1, or `max_norm` not > 0.

    | norm | result |
    |---|---|
    | the first `warmup_steps` | bounded by `max_norm` only |
    | all equal so far | the updates, bit for bit |
    | the first after a window of zeros | bounded by 0; it enters the history |
    | NaN or inf | as under a fixed bound; kept out of the history |
    | only NaN or inf so far | bounded by `max_norm` only |

    Derivatives are finite, and exist where no norm equals its bound and the norms in the window
    are not all equal.

    Differences from Levanter's `clip_update_norm`: the least standard deviation is relative to the
    mean, and norms that are not finite are left out.

    Example:
      >>> clip = clip_by_mean_std(3.0, window_size=4)
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 10.0):
      ...     clipped, state = clip.update(jnp.array([norm]), state)
      >>> clipped, state.max_norm
      (Array([5.], dtype=float32), Array(5., dtype=float32))

    References:
      Levanter, https://github.com/stanford-crfm/levanter (`ClipUpdateNormConfig`)
    """
    threshold = mean_and_deviation(z_max, window_size, warmup_steps=warmup_steps)
    return clip_by(norm, capped(threshold, max_norm), mask=mask, axis_name=axis_name)
