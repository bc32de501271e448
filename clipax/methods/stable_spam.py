"""Stable-SPAM: clips spiking entries, then normalizes each leaf."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _choice, _compat, _leaves, _moments, _paths, _range, _rules
from clipax._core._clip_by import ClipState, clip_by
from clipax._core._scaling import Factors, in_two, scale_updates
from clipax._core._transformation import transformation
from clipax._core._typing import Array, AxisName, Norms, Updates
from clipax.coefficients import hard, normalized
from clipax.norms import global_norm, leaf_norm
from clipax.thresholds import Threshold, fixed, per_norm

# The mean forgets a spike sooner than the root mean square does, and meanwhile the quotient is
# far below one. It falls to this share only after a spike of some ten million norms or more.
_LEAST_SHARE = 1e-6


class StableSpamState(NamedTuple):
    """The memory of `stable_spam`."""

    clip: ClipState
    """The record of the clip of entries, with a scalar per leaf."""
    moments: Any
    """The moments of the leaves' norms, stacked as by `per_norm`."""


class BoundState(NamedTuple):
    """The history of the largest moduli of a leaf."""

    mean: Array
    """The bias-corrected average of the largest modulus."""
    norm_count: Array
    """The number of norms in the average; int32."""


class NormState(NamedTuple):
    """The history of the norms of a leaf."""

    mean: Array
    """The bias-corrected average of the norm."""
    root_mean_square: Array
    """The root of the bias-corrected average of its square."""
    norm_count: Array
    """The number of norms in both averages; int32."""


def stable_spam(
    decay_bound: jax.typing.ArrayLike = 0.999,
    decay_norm: jax.typing.ArrayLike = 0.7,
    decay_square: jax.typing.ArrayLike = 0.9,
    *,
    eps: jax.typing.ArrayLike = 1e-8,
    clip_entries: bool = True,
    normalize: bool = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips spiking entries and then gives each leaf a norm of about one.

    For each leaf on its own, with bias-corrected running averages that count the current step:

    1. AdaClip: `max_norm = average(max_i |u_i|)`; entries with `|u_i| > max_norm` become
       `u_i * max_norm / max_i |u_i|`.
    2. AdaGN: `u <- u / |u|_2 * average(|u|_2) / (sqrt(average(|u|_2^2)) + eps)`.

    Put it before Adam, not before plain SGD, because the output forgets how large the gradients
    are: a leaf's norm is about one where they are steady, smaller after a spike, and below 1.41
    with these decays. After any finite updates, half of a usual norm passes within 325 steps (693
    without `normalize`).

    Args:
      decay_bound: The weight of the past in the bound on entries, in [0, 1). The defaults are the
        paper's.
      decay_norm: The weight of the past in the average norm, in [0, 1).
      decay_square: The weight of the past in the average squared norm, in [0, 1).
      eps: Added to the root, >= 0, in the unit of the norms.
      clip_entries: Whether the first half acts.
      normalize: Whether the second half acts; the first alone is a clip.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation with a `StableSpamState`. `clip` is a `ClipState` with a scalar per leaf:
      `norm` is the largest modulus of an entry, `max_norm` is the bound on entries (inf without
      `clip_entries`), and `coefficient` is the factor of the entries above it. `moments` holds the
      averages of the leaves' norms, measured after the first half.

    Raises:
      ValueError: A decay is not a number in [0, 1), or `eps` not a number >= 0; `clip_entries` or
        `normalize` is not a boolean.

    | leaf | result |
    |---|---|
    | first step | no entry is clipped; the norm becomes `norm / (norm + eps)`, about 1 |
    | an entry just above the bound, beside a spike | smaller than one just below the bound |
    | zero | zeros; its averages and counts stay |
    | zero in every step so far | the next nonzero step is its first |
    | after a spike of 1e8 norms or more | short for some 45 steps, then about 1 |
    | norms down to 1e-25 or up to 1e20 | as the formula says |
    | a NaN or inf entry | all NaN, or that entry without `normalize`; all averages stay |
    | finite, but the norm overflows its dtype | all NaN; the averages of the norms stay |
    | None, integer, bool, float0 leaf | unchanged, not measured |

    Derivatives are finite, and exist where no entry equals the bound and no leaf is zero.

    Differences from the paper: a zero leaf is not learned; the averages of the norms start again
    after a spike of some ten million norms; only the part before Adam is here, with its own step
    counts.

    Example:
      >>> clip = stable_spam(decay_bound=0.5, normalize=False)
      >>> state = clip.init(jnp.zeros(2))
      >>> for updates in (jnp.array([1.0, 1.0]), jnp.array([4.0, 2.0])):
      ...     clipped, state = clip.update(updates, state)
      >>> clipped, state.clip.max_norm
      (Array([3., 2.], dtype=float32), Array(3., dtype=float32))
      >>> clip = stable_spam()
      >>> clip.update(jnp.array([3.0, 4.0]), clip.init(jnp.zeros(2)))[0].round(3)
      Array([0.6, 0.8], dtype=float32)

    References:
      Huang et al., "Stable-SPAM", 2025, https://arxiv.org/abs/2502.17055
    """
    decays = {"decay_bound": decay_bound, "decay_norm": decay_norm, "decay_square": decay_square}
    _checks.scalar(_checks.decay_rate, **decays)
    _checks.scalar(_checks.non_negative, eps=eps)
    _checks.flag(clip_entries=clip_entries, normalize=normalize)

    def bound(norm: Array, state: BoundState, params: Any = None) -> tuple[Array, BoundState]:
        del params
        count = optax.safe_increment(state.norm_count)
        mean = _moments.mean(state.mean, norm, _moments.debiased(decay_bound, count, norm.dtype))
        state = _choice.choose(norm > 0, BoundState(mean, count), state)
        return state.mean, state

    def size(norm: Array, state: NormState, params: Any = None) -> tuple[Array, NormState]:
        del params
        count = optax.safe_increment(state.norm_count)
        mean = _moments.mean(state.mean, norm, _moments.debiased(decay_norm, count, norm.dtype))
        weight = _moments.debiased(decay_square, count, norm.dtype)
        # In this unit, no square leaves the range.
        unit = _range.finite_or_one(jnp.maximum(state.root_mean_square, norm))
        old, new = state.root_mean_square / unit, norm / unit
        root = unit * _moments.root(_moments.mean(old * old, new * new, weight))
        is_given_up = mean < _LEAST_SHARE * root
        first = NormState(norm, norm, jnp.ones_like(count))
        learned = _choice.choose(is_given_up, first, NormState(mean, root, count))
        state = _choice.choose(norm > 0, learned, state)
        divisor = state.root_mean_square + _leaves.in_dtype_of(norm, eps)[0]
        return state.mean / jnp.where(divisor > 0, divisor, 1), state

    learn = functools.partial(_learned, is_mapped=axis_name is not None)
    bounds = learn(bound, BoundState) if clip_entries else fixed(math.inf)
    entries = clip_by(_moments.given_norm, bounds, axis_name=axis_name)
    leaves = clip_by(_moments.given_norm, learn(size, NormState), _normalized, axis_name=axis_name)

    def init_fn(params: Updates) -> StableSpamState:
        moments = leaves.init(params).threshold if normalize else ()
        return StableSpamState(entries.init(params), moments)

    def update_fn(
        updates: Updates,
        state: StableSpamState,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, StableSpamState]:
        del params, extra_args
        wide = jax.tree.map(
            lambda leaf: _leaves.widened(jnp.asarray(leaf)), _rules.only_measured(updates)
        )
        # These reads are only for the norms, so that XLA keeps nothing of them for later use.
        read = jax.tree.map(_compat.optimization_barrier, wide)
        largest = leaf_norm(read, math.inf, axis_name=axis_name)
        _, clip = entries.update(largest, state.clip, norm=largest)
        bounds = clip.max_norm, *in_two(hard, clip.norm, clip.max_norm)
        clipped = _leaves.map_measured(_clip_leaf, wide, *bounds)
        moments = state.moments
        if normalize:
            # The largest entry ends at the bound, and no square over its own overflows.
            ends = jax.tree.map(jnp.minimum, clip.norm, clip.max_norm)
            units = jax.tree.map(_range.finite_or_one, ends)
            squares = _leaves.map_measured(_squares, read, units, *bounds)
            sums = _paths.flat(leaf_norm(squares, 1, axis_name=axis_name))
            norms = jax.tree.map(_norm_of, units, sums)
            # The record of this half is dropped: metrics read that of the first half alone.
            _, after = leaves.update(largest, clip._replace(threshold=moments), norm=norms)
            clipped = in_two(_normalized, norms, after.max_norm).scale(clipped)
            moments = after.threshold
        return _moments.narrowed(clipped, updates), StableSpamState(clip, moments)

    return transformation(init_fn, update_fn, StableSpamState)


def _learned(rule: Callable[..., Any], kind: type, *, is_mapped: bool) -> Threshold:
    """The rule for each norm, learning only from steps in which all norms are finite."""

    def start(zero: Array) -> Any:
        averages = [zero + 0 for _ in kind._fields[:-1]]  # type: ignore[attr-defined]
        return kind(*averages, zero.astype(jnp.int32))

    lifted = per_norm(optax.GradientTransformation(start, rule))

    def update_fn(norms: Norms, state: Any, params: Norms = None, **extra_args: Any) -> Any:
        results, learned = lifted.update(norms, state, params, **extra_args)
        # The leaf norms already cover all shards, so their maximum must not be reduced again.
        total = global_norm(norms, math.inf, axis_name=() if is_mapped else None)
        return results, _choice.choose(jnp.isfinite(total), learned, state)

    return Threshold(lifted.init, update_fn)


def _normalized(norm: Array, max_norm: Array) -> Array:
    # A leaf without a finite norm has no normalized form, so its factor is NaN.
    return jnp.where(jnp.isfinite(norm), normalized(norm, max_norm), jnp.nan)


def _clip_leaf(leaf: Array, bound: Array, first: Array, second: Array) -> Array:
    moduli = jnp.abs(leaf)
    exceeds = moduli > bound.astype(moduli.dtype)
    return Factors(*(jnp.where(exceeds, factor, 1) for factor in (first, second))).scale(leaf)


def _norm_of(unit: Array, total: Array | None) -> Array:
    """The norm from a sum of squares in a unit; zero for a leaf that this step does not have."""
    return jnp.zeros_like(unit) if total is None else unit * _moments.root(total)


def _squares(leaf: Array, unit: Array, *bound: Array) -> Array:
    return _leaves.squared_modulus(scale_updates(_clip_leaf(leaf, *bound), 1 / unit))
