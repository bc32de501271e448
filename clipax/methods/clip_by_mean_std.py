"""The mean of the last norms and some standard deviations."""

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
    """Bounds the norm by the mean of the last norms and `z_max` standard deviations.

    `max_norm_t = mean + z_max * max(std, 1e-6 * mean)` over the window of
    `norm_{t-W}, ..., norm_{t-1}` with `W = window_size`; `std` is the population's.

    Args:
      z_max: How many standard deviations above the mean a norm may lie, > 0. Levanter has 3.
      window_size: How many of the last norms are remembered, >= 1; one float each.
        Levanter has 128.
      norm: What is measured, and bounded by its own history: `global_norm`, `leaf_norm`
        for each leaf by itself, `block_rms`, ..., or your own.
      warmup_steps: How many norms the history needs before it bounds, >= 1; until then
        `max_norm` alone does. None is half the window, and at least 2, as in Levanter.
      max_norm: A cap on the bound, > 0, in the forms that `fixed` takes. None is no cap.
      mask: Which leaves are measured and clipped: True, a tree prefix of booleans, or a
        function `(path, leaf) -> bool`. The others, as frozen ones, pass as they are.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` in the structure of the norms; its
      threshold holds the window. `metrics` gives its quantiles 0.5, 0.9 and 0.99.

    Raises:
      ValueError: `z_max` is not a finite number > 0, `window_size` or `warmup_steps` not an
        integer >= 1, or `max_norm` not > 0.

    The history learns from raw norms, before clipping, and the norm at hand does not count.
    So a new level of norms becomes the usual one within a window; and one spike, until it
    leaves the window, raises the bound. Whatever finite norms came before, half of a usual norm
    passes within 5 steps; with a smaller `z_max`, within half a window and two steps.

    | norm | result |
    |---|---|
    | the first `warmup_steps` | bounded by `max_norm` alone |
    | all equal so far | the updates, bit for bit |
    | the first after a window of zeros | bounded by 0; it enters the history |
    | NaN or inf | as for a fixed bound; kept out of the history |
    | only NaN or inf so far | bounded by `max_norm` alone |

    Derivatives exist where no norm equals its bound and the norms in the window are not all
    equal. They are finite everywhere.

    Differences from Levanter's `clip_update_norm`: the least standard deviation is relative,
    there 1e-6, as is the least norm that the bound is divided by; a window of one norm clips
    from the third step on, there never; norms that are not finite are left out, where one would
    make the bound NaN for a window; it clips wherever it stands in the chain, there after the
    optimizer.

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
