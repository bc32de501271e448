"""ZClip: bounds norms by their z-score over running statistics."""

from collections.abc import Callable

import jax
import optax

from clipax._core._clip_by import clip_by
from clipax._core._transformation import injectable
from clipax._core._typing import Array, AxisName, Bound, LeafRule, Norm
from clipax.norms import global_norm
from clipax.thresholds import capped, reciprocal_bound, z_score


@injectable
def zclip(
    z_max: jax.typing.ArrayLike = 2.5,
    *,
    decay: jax.typing.ArrayLike = 0.97,
    warmup_steps: int = 25,
    max_norm: Bound | None = 1.0,
    norm: Norm = global_norm,
    spike_bound: Callable[[Array, Array, Array, Array], Array] = reciprocal_bound,
    factor: jax.typing.ArrayLike = 1.0,
    raw_history: bool = False,
    learn_from_spikes: bool = True,
    min_std: jax.typing.ArrayLike = 1e-3,
    eps: jax.typing.ArrayLike = 1e-6,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips norms that are outliers against a running mean and standard deviation.

        z = (norm - mean) / (std + eps)
        max_norm_t = factor * (mean + z_max^2 * std / z)     if z > z_max, which is a spike
        x = min(norm, max_norm_t) for a spike, else norm
        mean  <- decay * mean + (1 - decay) * x
        std^2 <- decay * std^2 + (1 - decay) * (x - mean)^2

    The current norm does not count in its own bound, and the first `warmup_steps` norms give the
    mean and (population) variance directly. After any finite norms, half of a usual norm passes
    within 210 steps: from the 200th spike in a row above twice its bound, the history learns raw
    norms. Another `z_max` needs about `log(2) / -log(decay)` steps after the 200th.

    Args:
      z_max: How many standard deviations above the mean a norm may lie, > 0. The defaults are
        those of the paper's code.
      decay: The weight of the past in the averages, in [0, 1).
      warmup_steps: How many norms the statistics start from, >= 1. Until then, only `max_norm`
        bounds.
      max_norm: A cap on the bound, > 0, in the forms that `fixed` takes. None sets no cap.
      norm: The norm that its own history bounds: `global_norm`, `leaf_norm` (one history per
        leaf), `block_rms`, ..., or your own.
      spike_bound: The bound of a spike, `(z, mean, std, z_max) -> bound`: `reciprocal_bound`,
        `mean_bound` (the reference's "mean") or `limit_bound` (its "percentile") in
        `clipax.thresholds`. The last ignores `eps`, as in the reference.
      factor: Multiplies the bound of a spike, > 0. The reference's `clip_factor` acts with
        `reciprocal_bound` only.
      raw_history: Whether spikes enter the history raw, so that a new level soon becomes the usual
        one. From clipped spikes, the history learns a new level late, or never if it is less than
        twice the old one.
      learn_from_spikes: Whether spikes enter the history at all.
      min_std: The share of the mean that counts as no spread, in [0, 1).
      eps: Added to the standard deviation, finite and > 0, in the unit of the norms.
      mask: As in `clip_by_global_norm`.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` in the structure of the norms. Its threshold
      holds the mean, standard deviation and count of each. Without a spike, `max_norm` is the norm
      that would be one.

    Raises:
      ValueError: An argument is out of its range or not a number, or `spike_bound` is not a
        function.

    | norm | result |
    |---|---|
    | the first `warmup_steps` | bounded by `max_norm` only, and learned raw |
    | no spike, at or under `max_norm` | the updates, bit for bit |
    | a spike after norms without spread | shrinks to their mean; the history learns it raw |
    | 200 spikes in a row, each more than twice its bound | the history learns the last raw |
    | zero | zeros; the zero enters the history |
    | NaN or inf | as under a fixed bound; the statistics stay |
    | only NaN or inf so far | bounded by `max_norm` only |

    Derivatives are finite. They exist where no norm is just a spike or just bounded by `max_norm`
    and the history has spread, but not with respect to a `decay` of zero.

    Differences from the paper's code: `min_std`, and raw norms after 200 spikes, without which a
    history of equal or tiny norms can clip usual norms for ever; norms that are not finite are
    left out; nothing is added to the norm.

    Example:
      >>> clip = zclip(2.0, warmup_steps=2, max_norm=None)
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 10.0):  # mean 2, std 1, z 8: the bound is 2 + 4 / 8
      ...     clipped, state = clip.update(jnp.array([norm]), state)
      >>> clipped.round(4)
      Array([2.5], dtype=float32)

    References:
      Kumar, Owen, Roy Chowdhury, Güra, 2025, https://arxiv.org/abs/2504.02507
    """
    threshold = z_score(
        z_max,
        decay=decay,
        warmup_steps=warmup_steps,
        spike_bound=spike_bound,
        factor=factor,
        raw_history=raw_history,
        learn_from_spikes=learn_from_spikes,
        min_std=min_std,
        eps=eps,
    )
    return clip_by(norm, capped(threshold, max_norm), mask=mask, axis_name=axis_name)
