"""A quantile of the norms in constant memory: the geometric tracker."""

import jax
import optax

from clipax._core._clip_by import clip_by
from clipax._core._transformation import injectable
from clipax._core._typing import AxisName, Bound, LeafRule, Norm
from clipax.norms import global_norm
from clipax.thresholds import capped, quantile_tracker


@injectable
def clip_by_quantile(
    quantile: jax.typing.ArrayLike = 0.5,
    *,
    learning_rate: jax.typing.ArrayLike = 0.2,
    norm: Norm = global_norm,
    max_norm: Bound | None = None,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the norm by a running estimate of a quantile of the norms.

    `max_norm_{t+1} = max_norm_t * exp(-learning_rate * ([norm_t <= max_norm_t] - quantile))`,
    where `[...]` is 1 or 0. The bound rises after a norm above it and falls otherwise, and settles
    where the share `quantile` of norms lies at or under it. It works like `autoclip` in the memory
    of one number.

    The estimate learns raw norms, before clipping, and the current norm does not count. After any
    finite norms, half of a usual norm passes within 201 steps: the estimate starts again from the
    last norm after 200 norms in a row above twice the estimate, or `20 / quantile` if that is
    more.

    Args:
      quantile: The share of norms that pass unclipped, in (0, 1). The paper has 0.5; 0.9 clips one
        step in ten.
      learning_rate: How far a step moves the logarithm of the bound, > 0. The paper has 0.2; 0.01
        settles more slowly and more closely.
      norm: The norm that its own history bounds: `global_norm`, `leaf_norm` (one history per
        leaf), `block_rms`, ..., or your own.
      max_norm: A cap on the bound, > 0, in the forms that `fixed` takes. None sets no cap.
      mask: As in `clip_by_global_norm`.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` in the structure of the norms. Its threshold
      holds the next bound.

    Raises:
      ValueError: `quantile` is not in (0, 1), `learning_rate` not a finite number > 0, or
        `max_norm` not > 0.

    | norm | result |
    |---|---|
    | the first one, finite and not zero | bounded by `max_norm` only; starts the estimate |
    | at or under the bound | the updates, bit for bit |
    | zero | zeros; the estimate stays, because it could fall to zero and never rise again |
    | NaN or inf | as under a fixed bound; the estimate stays |
    | only NaN or inf so far | bounded by `max_norm` only |
    | more than twice the estimate, 200 times in a row | clipped; the last is the estimate |

    Derivatives are finite, and exist where no norm equals its bound. Past norms are only counted,
    so only the norm that started the estimate has a derivative.

    Differences from the paper: one norm per step, without noise; the estimate starts at the first
    norm and again where it is far too low; zero norms do not count.

    Example:
      >>> clip = clip_by_quantile(0.5)
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (1.0, 5.0):
      ...     clipped, state = clip.update(jnp.array([norm]), state)
      >>> clipped, state.max_norm
      (Array([1.], dtype=float32), Array(1., dtype=float32))

    References:
      Andrew, Thakkar, McMahan, Ramaswamy, 2021, https://arxiv.org/abs/1905.03871
    """
    threshold = quantile_tracker(quantile, learning_rate=learning_rate)
    return clip_by(norm, capped(threshold, max_norm), mask=mask, axis_name=axis_name)
