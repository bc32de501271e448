"""ZClip: a z-score against running statistics of the norms."""

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

    With `z = (norm - mean) / (std + eps)`, a norm is a spike if `z > z_max`, and then
    `max_norm_t = factor * (mean + z_max^2 * std / z)`; whatever it is, it ends at or under
    `max_norm`. What enters the history is `x = min(norm, max_norm_t)` for a spike, else the
    norm: `mean <- decay * mean + (1 - decay) * x`, and then
    `std^2 <- decay * std^2 + (1 - decay) * (x - mean)^2`. The first `warmup_steps` norms
    give mean and (population) variance as they are.

    Whatever finite norms came before, half of a usual norm passes within 210 steps: the 200th
    spike in a row that is more than twice its bound enters the history as it was, and so do
    those after it, also without `learn_from_spikes`. With another `z_max` it is some
    `log(2) / -log(decay)` steps after the 200th.

    Args:
      z_max: How many standard deviations above the mean a norm may lie, > 0.
      decay: The weight of the past in the averages, in [0, 1).
      warmup_steps: How many norms the statistics start from, >= 1; until then `max_norm`
        alone bounds.
      max_norm: A cap on the bound, > 0, in the forms that `fixed` takes. None is no cap.
      norm: What is measured, and bounded by its own history: `global_norm`, `leaf_norm`
        for each leaf by itself, `block_rms`, ..., or your own.
      spike_bound: What a spike shrinks to, `(z, mean, std, z_max) -> bound`:
        `reciprocal_bound`, `mean_bound` (the reference's "mean") or `limit_bound` (its
        "percentile"). Under `limit_bound`, `norm > mean + z_max * std` is a spike, without
        `eps`, as in the reference.
      factor: Multiplies the bound of a spike, > 0: the reference's `clip_factor`, which there
        multiplies that of `reciprocal_bound` alone.
      raw_history: Whether spikes enter the history as they were. A new level of norms then
        soon becomes the usual one; of clipped spikes, under `mean_bound` above all, the
        history learns it late or, if it is less than twice the old one, never.
      learn_from_spikes: Whether they enter it at all.
      min_std: Which share of the mean counts as no spread, in [0, 1).
      eps: Added to the standard deviation, a finite number > 0 in the unit of the norms.
      mask: Which leaves are measured and clipped: True, a tree prefix of booleans, or a
        function `(path, leaf) -> bool`. The others, as frozen ones, pass as they are.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` in the structure of the norms; its
      threshold holds mean, standard deviation and count of each. Where no spike is, the
      state's `max_norm` is the norm from which one would be.

    Raises:
      ValueError: A number is out of its range, NaN, boolean, None or a string, or
        `spike_bound` is no function.

    The defaults are those of the paper's code.

    | norm | result |
    |---|---|
    | the first `warmup_steps` | bounded by `max_norm` alone, and learned as they were |
    | no spike, at or under `max_norm` | the updates, bit for bit |
    | a spike after norms without spread | shrinks to their mean; the history learns it raw |
    | 200 spikes in a row, each more than twice its bound | the history learns the last raw |
    | zero | zeros; the zero enters the history |
    | NaN or inf | as for a fixed bound; the statistics stay |
    | only NaN or inf so far | bounded by `max_norm` alone |

    Derivatives exist where no norm is just a spike or just bounded by `max_norm`, and the
    history has spread. By a `decay` of zero there is none. They are finite everywhere.

    Differences from the paper's code: without spread, it would learn the mean from every
    spike and so clip any larger norm to it for ever; `min_std` ends that. From statistics of
    tiny norms it would hold usual ones down for hundreds of steps or for ever; raw norms after
    200 spikes end that. A spike's bound
    that `factor` lifts above the norm is not learned, the norm is. Norms that are not
    finite are left out. No 1e-6 beside the norm: a clipped norm ends at the bound. The
    standard deviation is kept, not its square, for range.

    Example:
      >>> clip = zclip(2.0, warmup_steps=2, max_norm=None)
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (1.0, 3.0, 10.0):  # mean 2, std 1, z 8: the bound is 2 + 4 / 8
      ...     clipped, state = clip.update(jnp.array([norm]), state)
      >>> clipped.round(4)
      Array([2.5], dtype=float32)

    References:
      Kumar, Owen, Roy Chowdhury, Güra, "ZClip: adaptive spike mitigation for LLM
      pre-training", 2025, https://arxiv.org/abs/2504.02507
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
