"""Outliers against running statistics of the norms."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _choice, _leaves, _moments, _patience
from clipax._core._typing import Array
from clipax.thresholds._per_norm import per_norm
from clipax.thresholds._threshold import Threshold


class ZClipState(NamedTuple):
    """The history of one norm under `z_score`."""

    mean: Array
    """The running mean; 0 before the first norm."""
    std: Array
    """The running standard deviation; 0 before the second norm."""
    norm_count: Array
    """The number of norms learned from; int32."""
    halved_count: Array
    """How many spikes in a row were more than twice their bounds; int32."""


def reciprocal_bound(z: Array, mean: Array, std: Array, z_max: Array) -> Array:
    """Computes `bound = mean + z_max^2 * std / z`: a worse spike shrinks more.

    Example:
      >>> z, mean, std, z_max = jnp.array([5.0, 1.0, 0.1, 2.0])
      >>> reciprocal_bound(z, mean, std, z_max)
      Array(1.08, dtype=float32)
    """
    return mean + z_max * (z_max / z) * std


def mean_bound(z: Array, mean: Array, std: Array, z_max: Array) -> Array:
    """Computes `bound = mean`: a spike shrinks to the usual norm.

    Example:
      >>> z, mean, std, z_max = jnp.array([5.0, 1.0, 0.1, 2.0])
      >>> mean_bound(z, mean, std, z_max)
      Array(1., dtype=float32)
    """
    del z, std, z_max
    return mean


def limit_bound(z: Array, mean: Array, std: Array, z_max: Array) -> Array:
    """Computes `bound = mean + z_max * std`: a spike becomes the largest usual norm.

    Example:
      >>> z, mean, std, z_max = jnp.array([5.0, 1.0, 0.1, 2.0])
      >>> limit_bound(z, mean, std, z_max)
      Array(1.2, dtype=float32)
    """
    del z
    return mean + z_max * std


def z_score(
    z_max: jax.typing.ArrayLike = 2.5,
    *,
    decay: jax.typing.ArrayLike = 0.97,
    warmup_steps: int = 25,
    spike_bound: Callable[[Array, Array, Array, Array], Array] = reciprocal_bound,
    factor: jax.typing.ArrayLike = 1.0,
    raw_history: bool = False,
    learn_from_spikes: bool = True,
    min_std: jax.typing.ArrayLike = 1e-3,
    eps: jax.typing.ArrayLike = 1e-6,
) -> Threshold:
    """Bounds each norm that is an outlier against the mean and deviation of its past.

    This is the rule of `zclip`, which documents the arguments in full.

    Args:
      z_max: How many standard deviations above the mean a norm may lie, > 0.
      decay: The weight of the past in the averages, in [0, 1).
      warmup_steps: How many norms the statistics start from, >= 1.
      spike_bound: What a spike shrinks to, `(z, mean, std, z_max) -> bound`.
      factor: Multiplies the bound of a spike, > 0.
      raw_history: Whether spikes enter the history before they are clipped.
      learn_from_spikes: Whether spikes enter the history at all.
      min_std: The share of the mean that counts as no spread, in [0, 1).
      eps: Added to the standard deviation, a finite number > 0.

    Returns:
      A threshold whose state holds a `ZClipState` for each norm.

    Raises:
      ValueError: A number is out of its range, or `spike_bound` is not a function.

    Example:
      >>> threshold = z_score(2.0, warmup_steps=2)
      >>> state = threshold.init(jnp.array(0.0))
      >>> for norm in (1.0, 3.0, 10.0):  # mean 2, std 1, z 8: the bound is 2 + 4 / 8
      ...     max_norm, state = threshold.update(jnp.array(norm), state)
      >>> max_norm.round(4)
      Array(2.5, dtype=float32)
    """
    _checks.scalar(_checks.finite_positive, z_max=z_max, factor=factor, eps=eps)
    _checks.scalar(_checks.decay_rate, decay=decay, min_std=min_std)
    _checks.positive_integer(warmup_steps=warmup_steps)
    _checks.flag(raw_history=raw_history, learn_from_spikes=learn_from_spikes)
    _checks.function(spike_bound=spike_bound)

    def init_fn(zero: Array) -> ZClipState:
        return ZClipState(zero + 0, zero + 0, zero.astype(jnp.int32), zero.astype(jnp.int32))

    def update_fn(norm: Array, state: ZClipState, params: Any = None) -> tuple[Array, ZClipState]:
        del params
        mean, std, count, halved_count = state
        z_top, scale, least, guard = _leaves.in_dtype_of(norm, z_max, factor, min_std, eps)
        is_warmed_up = count >= warmup_steps
        limit = mean + z_top * (std if spike_bound is limit_bound else std + guard)
        is_spike = is_warmed_up & (norm > limit)
        # `spike_bound` divides by this, also where there is no spike, so it is at least z_max.
        z = jnp.maximum((norm - mean) / (std + guard), z_top)
        shrunk = scale * spike_bound(z, mean, std, z_top)
        max_norm = jnp.where(is_warmed_up, jnp.where(is_spike, shrunk, limit), jnp.inf)
        halved_count = _patience.count_halved(halved_count, norm, max_norm)
        state = state._replace(halved_count=halved_count)
        # Statistics that have no spread, or are long out of date, do not limit what they learn.
        is_trusted = (std > least * mean) & (halved_count < _patience.PATIENCE)
        seen = norm if raw_history else jnp.where(is_trusted, jnp.minimum(norm, shrunk), norm)
        learned = learn(state, jnp.where(is_spike, seen, norm))
        if not learn_from_spikes:
            learned = _choice.choose(is_spike & is_trusted, state, learned)
        return max_norm, learned

    def learn(state: ZClipState, value: Array) -> ZClipState:
        mean, std, count, _ = state
        is_warmed_up = count >= warmup_steps
        old, new = _leaves.in_dtype_of(value, decay, 1 - decay)
        weight = jnp.where(is_warmed_up, new, 1 / (count + 1).astype(value.dtype))
        past = jnp.where(is_warmed_up, old, 1 - weight)
        # `per_norm` drops what is learned from a norm that is not finite, but `jax_debug_nans`
        # would see zero times inf.
        deviation = jnp.where(jnp.isfinite(value), value - mean, 0)
        # Welford's variance multiplies the deviations from the old and the new mean. The paper's
        # average squares the deviation from the new mean, so it has one more factor.
        share = weight * past * jnp.where(is_warmed_up, past, 1)
        kept, added = _moments.root(past) * std, _moments.root(share) * deviation
        new_std = _moments.hypotenuse(kept, added)
        new_mean = _moments.mean(mean, value, weight)
        return state._replace(mean=new_mean, std=new_std, norm_count=optax.safe_increment(count))

    return per_norm(optax.GradientTransformation(init_fn, update_fn))
