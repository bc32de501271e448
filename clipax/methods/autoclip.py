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
    """Bounds the norm by a quantile of the norms so far.

    `max_norm_t = quantile_q(norm_{t-W+1}, ..., norm_t)` with linear interpolation, as in
    `numpy.quantile`, over a window of `W = window_size` norms.

    The default of 0.1 clips nine steps in ten and so nearly normalizes; 0.9 clips one step in ten.
    The history learns raw norms, before clipping. After any finite norms, half of a usual norm
    passes within 900 steps, and in general within `(1 - quantile) * window_size + 2`.

    Args:
      quantile: The share of norms at or under the bound, in (0, 1). The paper has 0.1.
      window_size: How many norms are remembered, >= 1, at one float each. The paper keeps all.
      norm: The norm that its own history bounds: `global_norm`, `leaf_norm` (one history per
        leaf), `block_rms`, ..., or your own.
      count_current: Whether the current norm counts in its own bound, as in the paper.
      warmup_steps: How many norms the history needs before it bounds, >= 1. Until then, only
        `max_norm` does.
      max_norm: A cap on the bound, > 0, in the forms that `fixed` takes. None sets no cap.
      mask: As in `clip_by_global_norm`.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` in the structure of the norms. Its threshold
      holds the window, of which `metrics` gives the quantiles 0.5, 0.9 and 0.99.

    Raises:
      ValueError: `quantile` is not in (0, 1), `window_size` or `warmup_steps` not an integer >= 1,
        `max_norm` not > 0, or `count_current` not a boolean.

    | norm | result |
    |---|---|
    | the first ones, fewer than `warmup_steps` | bounded by `max_norm` only |
    | all equal so far | the updates, bit for bit |
    | zero | zeros; the zero enters the history, and zeros can make the bound zero |
    | NaN or inf | as under a fixed bound; kept out of the history |
    | only NaN or inf so far | bounded by `max_norm` only |

    Derivatives are finite, and exist where no norm equals its bound or another norm in the window.

    Differences from the paper's code: there is a window, nothing is added to the norm, and norms
    that are not finite are left out.

    Example:
      >>> clip = autoclip(0.5)
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0, 9.0):
      ...     clipped, state = clip.update(jnp.array([norm]), state)
      >>> clipped, state.max_norm
      (Array([2.], dtype=float32), Array(2., dtype=float32))

    References:
      Seetharaman et al., 2020, https://arxiv.org/abs/2007.14469
    """
    threshold = window_quantile(
        quantile, window_size, count_current=count_current, warmup_steps=warmup_steps
    )
    return clip_by(norm, capped(threshold, max_norm), mask=mask, axis_name=axis_name)
