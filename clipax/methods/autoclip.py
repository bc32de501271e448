"""AutoClip: a quantile of the history of norms."""

import jax
import optax

from clipax._core._clip_by import clip_by
from clipax._core._transformation import injectable
from clipax._core._typing import AxisName, Bound, LeafRule, Norm
from clipax.norms import global_norm
from clipax.thresholds import capped, window_quantile


@injectable
def autoclip(
    quantile: jax.typing.ArrayLike = 0.1,
    window_size: int = 1000,
    *,
    norm: Norm = global_norm,
    count_current: bool = True,
    warmup_steps: int = 1,
    max_norm: Bound | None = None,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the norm by a quantile of the norms seen so far.

    `max_norm_t = quantile_q(norm_{t-W+1}, ..., norm_t)` with linear interpolation, as
    `numpy.quantile`, over a window of `W = window_size` norms.

    The default clips: nine steps in ten end at the tenth percentile, which acts almost as
    normalization. With 0.9, one step in ten is clipped.

    Args:
      quantile: The share of norms at or under the bound, in (0, 1). The paper has 0.1.
      window_size: How many of the last norms are remembered, >= 1; one float each. The
        paper has no window: it keeps them all.
      norm: What is measured, and bounded by its own history: `global_norm`, `leaf_norm`
        for each leaf by itself, `block_rms`, ..., or your own.
      count_current: Whether the norm at hand counts among the history, as in the paper, or
        only the past does.
      warmup_steps: How many norms the history needs before it bounds, >= 1; until then
        `max_norm` alone does.
      max_norm: A cap on the bound, > 0, in the forms that `fixed` takes. None is no cap.
      mask: Which leaves are measured and clipped: True, a tree prefix of booleans, or a
        function `(path, leaf) -> bool`. The others, as frozen ones, pass as they are.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` in the structure of the norms; its
      threshold holds the window. `metrics` gives its quantiles 0.5, 0.9 and 0.99.

    Raises:
      ValueError: `quantile` is not in (0, 1), `window_size` or `warmup_steps` not an
        integer >= 1, `max_norm` not > 0, or `count_current` not a boolean.

    The history learns from raw norms, before clipping, so that it cannot collapse. Whatever
    finite norms came before, half of a usual norm passes within 900 steps: in general, within
    `(1 - quantile) * window_size + 2`, when that share of the window is usual again.

    | norm | result |
    |---|---|
    | the first ones, fewer than `warmup_steps` | bounded by `max_norm` alone |
    | all equal so far | the updates, bit for bit |
    | zero | zeros; the zero enters the history, and zeros can make the bound zero |
    | NaN or inf | as for a fixed bound; kept out of the history |
    | only NaN or inf so far | bounded by `max_norm` alone |

    Derivatives exist where no norm equals its bound or another norm in the window. They are
    finite everywhere.

    Differences from the paper's code: a window, whose quantile is the paper's while the
    norms fit; no 1e-6 beside the norm, so a clipped norm ends at the bound; norms that are
    not finite are left out. For TRELLIS's clipper: `autoclip(0.95, count_current=False,
    warmup_steps=1000, max_norm=1.0)`.

    Example:
      >>> clip = autoclip(0.5)
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0, 9.0):
      ...     clipped, state = clip.update(jnp.array([norm]), state)
      >>> clipped, state.max_norm
      (Array([2.], dtype=float32), Array(2., dtype=float32))

    References:
      Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: adaptive gradient clipping for source
      separation networks", 2020, https://arxiv.org/abs/2007.14469
    """
    threshold = window_quantile(
        quantile, window_size, count_current=count_current, warmup_steps=warmup_steps
    )
    return clip_by(norm, capped(threshold, max_norm), mask=mask, axis_name=axis_name)
