"""SPAM's clip: bounds each entry by its own second moment."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipax._core import (
    _checks,
    _choice,
    _compat,
    _kinds,
    _leaves,
    _moments,
)
from clipax._core._clip_by import ClipState, clip_by
from clipax._core._scaling import scale_updates
from clipax._core._transformation import injectable, transformation
from clipax._core._typing import Array, AxisName, Bound, Norms, Updates
from clipax.norms import leaf_norm
from clipax.thresholds import Threshold
from clipax.thresholds._fixed import bounded


class SpamClipState(NamedTuple):
    """The memory of `spam_clip`."""

    clip: ClipState
    rms: Updates
    """The root of each entry's running mean square, after clipping; 0 without a history."""
    step_count: Array
    """The number of the last step that was learned, which is 0 at a reset; int32."""


@injectable
def spam_clip(
    square_ratio: Bound = 5000.0,
    *,
    decay: jax.typing.ArrayLike = 0.999,
    warmup_steps: int = 20,
    reset_every: int | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips each entry whose square is far above the running mean of its squares.

        u_i <- u_i * min(1, sqrt(square_ratio * v_i) / |u_i|)
        v_i <- decay * v_i + (1 - decay) * |u_i|^2    with the clipped u_i

    `v_i` starts at zero without bias correction. The current entry does not count in its own
    bound. A complex entry keeps its phase. Put `spam_clip` before the optimizer, whose momentum it
    never resets. After any finite updates, half of a usual norm passes within 100 steps.

    Args:
      square_ratio: The bound on an entry's square over the mean of its squares, > 0: a number, a
        scalar array, a schedule `count -> value`, or a tree prefix of them. At 1 or below, clipped
        entries would pull their own bound down to zero. The defaults are those of the paper's
        code, apart from the reset.
      decay: The weight of the past in the mean of squares, in [0, 1).
      warmup_steps: The number of the first step that can clip, >= 1. Steps count from 1 at the
        start and from 0 at a reset.
      reset_every: The means return to zero at every multiple of this step, > `warmup_steps`. SPAM
        has 500; None never resets.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation with a `SpamClipState`. `rms`, the root of `v`, has the shapes of the
      parameters, in float32 (float64 for float64 leaves). `clip` is a `ClipState` with a scalar
      per leaf: `norm` is the largest `|u_i| / sqrt(v_i)` of an entry that can be clipped now,
      `max_norm` is `sqrt(square_ratio)`, and `coefficient` is the smallest factor of an entry.

    Raises:
      ValueError: An argument is out of its range or not a number, or `reset_every` is not
        > `warmup_steps`; at `init`, a prefix does not fit; at `update`, the updates have another
        structure than at `init`.

    | entry | result |
    |---|---|
    | in a step before number `warmup_steps`, from the start or a reset | unchanged, bit for bit |
    | square <= square_ratio * v_i | unchanged, bit for bit |
    | zero | zero, which v_i learns |
    | zero in every step so far | the first nonzero one passes unchanged |
    | square below 1e-38 | learned as zero |
    | above 9.2e18, and not the first nonzero one | clipped to that, or its bound |
    | the first nonzero one, above 9.2e18 | learned as that |
    | NaN or inf | NaN, in warm-up unchanged; no entry of any leaf is learned, no step counted |
    | beside a NaN or inf entry | clipped as usual |
    | None, integer, bool, float0 leaf | unchanged, not measured |

    Derivatives are finite, and exist where no entry equals its bound.

    Differences from the paper: an entry with only zeros so far is not clipped to zero; an infinite
    entry does not become the bound; the reset is off by default.

    Example:
      >>> clip = spam_clip(9.0, decay=0.75, warmup_steps=1)
      >>> state = clip.init(jnp.zeros(2))
      >>> for entry in (2.0, 10.0):  # the root of 0.25 * 2^2 is 1: the bound is 3
      ...     clipped, state = clip.update(jnp.array([entry, 0.5]), state)
      >>> clipped
      Array([3. , 0.5], dtype=float32)

    References:
      Huang et al., "SPAM", 2025, https://arxiv.org/abs/2501.06842
    """
    _checks.scalar(_checks.decay_rate, decay=decay)
    _checks.positive_integer(warmup_steps=warmup_steps)
    if reset_every is not None:
        _checks.positive_integer(reset_every=reset_every)
        if reset_every <= warmup_steps:
            raise ValueError(
                f"reset_every must be > warmup_steps, or nothing would ever be clipped, got"
                f" {reset_every!r} and warmup_steps={warmup_steps!r}."
            )
    roots = _root_of(bounded(_checks.positive, square_ratio=square_ratio))
    record = clip_by(_moments.given_norm, roots, axis_name=axis_name)

    def init_fn(params: Updates) -> SpamClipState:
        rms = _moments.zero_moduli(params)
        zero = _moments.zero_norm(rms, axis_name=axis_name)
        return SpamClipState(record.init(rms), rms, zero.astype(jnp.int32))

    def update_fn(
        updates: Updates,
        state: SpamClipState,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, SpamClipState]:
        del params, extra_args
        rms, step = state.rms, optax.safe_increment(state.step_count)
        if reset_every is not None:
            step = jnp.where(step >= reset_every, 0, step)
            rms = _choice.choose(step == 0, jax.tree.map(jnp.zeros_like, rms), rms)
        wide = _moments.widened(updates, rms)
        is_on, weight = step >= warmup_steps, jnp.asarray(1 - decay, float)

        def relative(x: Array, rms: Array) -> Array:
            """`|x| / rms`, or 0 where the entry cannot be clipped."""
            can_be = is_on & (rms > 0)
            # The quotient has one use, because XLA would keep it in memory for two.
            most = jnp.where(jnp.isfinite(x), np.finfo(rms.dtype).max, jnp.inf)
            quotient = jnp.minimum(jnp.abs(x) / jnp.where(can_be, rms, 1), most)
            return jnp.where(can_be, quotient, _moments.zero_or_nan(x))

        def learn(rms: Array, x: Array, root: Array) -> Array:
            bound, modulus = _squarable(root * rms), _squarable(jnp.abs(x))
            exceeds = is_on & (rms > 0) & (jnp.abs(x) > bound)
            square = _moments.power(jnp.where(exceeds, bound, modulus))
            new = _moments.root(_moments.mean(rms * rms, square, weight))
            # `clip_leaf` takes an entry that ends here for one without a history.
            is_alike = exceeds & _is_first(new, x, weight)
            return jnp.where(is_alike, new * (1 + 8 * np.finfo(new.dtype).eps), new)

        def clip_leaf(x: Array, rms: Array, root: Array) -> Array:
            """Clips an entry to the bound that it had before its mean learned.

            A clipped entry adds its bound, `square_ratio * v`, to the mean of squares `v`. So the
            new one is `v * (decay + weight * square_ratio)`, and beside any other entry larger.
            """
            learned = jnp.where(is_finite, weight, 0).astype(rms.dtype)
            bound = _squarable(root / jnp.sqrt((1 - learned) + learned * root * root) * rms)
            # Rounding must not clip an entry at its bound.
            slack = jnp.where(is_finite, 1 + 8 * np.finfo(rms.dtype).eps, 1).astype(rms.dtype)
            modulus = jnp.abs(x)
            is_bounded = ~_is_first(rms, x, learned) | (modulus == jnp.inf)
            exceeds = is_on & is_bounded & (modulus > slack * bound)
            if not jnp.iscomplexobj(x):
                # No quotient, because XLA keeps one in memory instead of computing it again.
                return jnp.where(exceeds, jnp.where(x < 0, -bound, bound) + (x - x), x)
            direction = _moments.divided(x, jnp.where(exceeds, modulus, 1))
            return jnp.where(exceeds, scale_updates(direction, bound), x)

        # These reads are only for the norm, so that XLA keeps nothing of them for later use.
        read = jax.tree.map(_compat.optimization_barrier, (wide, rms))
        quotients = _kinds.map_alike(relative, *read)
        sizes = leaf_norm(quotients, math.inf, axis_name=axis_name)
        _, clip = record.update(sizes, state.clip, norm=sizes)
        is_finite = _moments.none_is_nan(
            _kinds.map_alike(_moments.zero_or_nan, sizes), axis_name=axis_name
        )
        means = _leaves.map_measured(_kinds.once_per_kind(learn), rms, wide, clip.max_norm)
        learned = means, step, clip.threshold
        before = state.rms, state.step_count, state.clip.threshold
        rms, count, threshold = _choice.choose(is_finite, learned, before)
        # Everything later reads what is written here, so that XLA writes it in place.
        rms = jax.tree.map(_compat.optimization_barrier, rms)
        clip_once = _kinds.once_per_kind(clip_leaf)
        clipped = _leaves.map_measured(clip_once, wide, rms, clip.max_norm)
        clip = clip._replace(threshold=threshold)
        return _moments.narrowed(clipped, updates), SpamClipState(clip, rms, count)

    return transformation(init_fn, update_fn, SpamClipState)


def _root_of(ratios: Threshold) -> Threshold:
    def update_fn(norms: Norms, state: Any, params: Norms = None, **extra_args: Any) -> Any:
        bounds, state = ratios.update(norms, state, params, **extra_args)
        return jax.tree.map(jnp.sqrt, bounds), state

    return Threshold(ratios.init, update_fn)


def _squarable(modulus: Array) -> Array:
    return jnp.minimum(modulus, _moments.largest_to_square(modulus.dtype))


def _is_first(rms: Array, x: Array, weight: Array) -> Array:
    """Whether the mean of squares is about `weight * |x|^2`, as after zeros."""
    near = 4 * np.finfo(rms.dtype).eps
    square = _moments.power(_squarable(jnp.abs(x)))
    learned, mean = weight.astype(rms.dtype) * square, rms * rms
    return (mean >= (1 - near) * learned) & (mean <= (1 + near) * learned)
