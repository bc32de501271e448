"""Skipping an optimizer's step where a norm or a loss is too large."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipax._core import (
    _checks,
    _choice,
    _leaves,
    _norm_trees,
    _placement,
    _select,
    _window,
)
from clipax._core._shown import shown
from clipax._core._transformation import injectable, transformation
from clipax._core._typing import Array, AxisName, Bound, Updates
from clipax.norms import global_norm
from clipax.thresholds._fixed import bounded


class SkipState(NamedTuple):
    """Which steps were skipped, and the history that the next ones are compared with."""

    norm: Array
    """The global L2 norm of the last incoming updates, NaN or inf included."""
    is_skipped: Array
    """Whether the last step was skipped; bool."""
    skipped_count: Array
    """How many steps were skipped in all; int32."""
    consecutive_count: Array
    """How many steps in a row were skipped, up to the last, not counting `skip_ranges`; int32."""
    taken_count: Array
    """How many steps were not skipped; int32."""
    threshold: Any
    """The state of the rule that gives `skip_above`."""
    norm_window: Any
    """The last finite norms, if `z_max` is set."""
    loss_window: Any
    """The last losses, if `loss_z_max` is set."""
    inner_state: Any

    @property
    def step_count(self) -> Array:
        """How many steps there were in all, which is the number of the next step."""
        return self.taken_count + self.skipped_count


@injectable
def skip_step(
    inner: optax.GradientTransformation,
    skip_above: Bound | None = None,
    *,
    z_max: jax.typing.ArrayLike | None = None,
    loss_z_max: jax.typing.ArrayLike | None = None,
    window_size: int = 128,
    warmup_steps: int | None = None,
    skip_ranges: Sequence[tuple[int, int]] = (),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips an optimizer's step where the gradient is not finite or is a spike.

    A step is skipped if `norm`, the global L2 norm of the incoming updates, is NaN or inf, if
    `norm > skip_above`, or if `norm - mean > z_max * max(std, 1e-6 * |mean|)` over a window of the
    last finite norms, with `std` over `n - 1`. `loss_z_max` is the same rule for losses. A skipped
    step returns zeros and keeps the inner state.

    Wrap the whole optimizer, clip included, because there are no spikes behind a clip:
    `skip_step(optax.chain(clip_by_global_norm(1.0), optax.adam(1e-3)), z_max=6.0)`.

    The windows learn the raw values of skipped steps too, so a new level becomes the usual one
    after a few steps. After any finite norms, half of a usual norm passes within 5 steps for
    `z_max=6`, and within `window_size + 1` for the smallest `z_max`.

    Args:
      inner: A whole optimizer, an `optax.MultiSteps`, or any transformation.
      skip_above: The norm above which a step is skipped, > 0: a number, a scalar array or a
        schedule `count -> value` over the steps with a finite norm. None sets no such bound.
      z_max: How many standard deviations above the mean a norm may lie, > 0; OLMo-core has 6. None
        turns this rule off.
      loss_z_max: The same for the loss, which `update` then takes as `loss=`: one number, the same
        on all devices.
      window_size: How many values are remembered, >= 2, at one float each. OLMo-core has 128.
      warmup_steps: The first value, counting the current one, to which a window applies, >= 1, but
        the third at the earliest. None is half the window.
      skip_ranges: Steps to skip in any case, as pairs `(start, stop)` with `0 <= start < stop`;
        step `stop` is not skipped. Every call of `update` is a step, and the first is step 0.
        Pairs may overlap.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `SkipState` around the inner state; its norms are float32,
      or float64 where a parameter is. `update` passes extra arguments on to `inner`, `loss` too.

    Raises:
      ValueError: `inner` is not a transformation; `skip_above`, `z_max` or `loss_z_max` is not
        > 0, `window_size` not an integer >= 2, `warmup_steps` not an integer >= 1, or
        `skip_ranges` not such pairs; at `update`, `loss_z_max` needs a `loss` that is missing or
        not a scalar.

    | step | result |
    |---|---|
    | not skipped | what `inner` gives, bit for bit; compiled alone, it may round differently |
    | skipped | -0.0 everywhere, which leaves a parameter unchanged, -0.0 too |
    | skipped, an integer or bool leaf | 0 or False |
    | skipped, a None, MaskedNode, float0 or PRNG-key leaf, or not an array | unchanged |
    | a norm or watched loss of NaN or inf, however many in a row | skipped; not learned |
    | in a pair of `skip_ranges` | skipped; not learned, nor counted by a schedule |
    | in a pair, between skipped steps | does not count in a row of skipped steps, nor ends it |
    | the first, whatever its finite norm | taken, if it is not above `skip_above` |
    | one above a window of equal norms | skipped, if by more than a share of `1e-6 * z_max` |
    | one below the mean | taken |
    | a bound that turns out NaN | skipped |

    Derivatives exist where no watched value equals its bound, and are zero through a skipped step.
    Where that step held a NaN, reverse-mode derivatives are NaN.

    Example:
      >>> optimizer = skip_step(optax.sgd(1.0), z_max=3.0, window_size=4)
      >>> state = optimizer.init(jnp.zeros(1))
      >>> for norm in (1.0, 2.0, 3.0, 6.0):
      ...     updates, state = optimizer.update(jnp.array([norm]), state)
      ...     print(updates, state.is_skipped)
      [-1.] False
      [-2.] False
      [-3.] False
      [-0.] True

    References:
      OLMo-core, https://github.com/allenai/OLMo-core (`SkipStepOptimizer`)
    """
    inner = _checks.transformation(inner=inner)
    _checks.axis_name(axis_name=axis_name)
    skip_above = math.inf if skip_above is None else skip_above
    _checks.one_bound(_checks.positive, skip_above=skip_above)
    limit = bounded(_checks.positive, skip_above=skip_above)
    if z_max is not None:
        _checks.scalar(_checks.positive, z_max=z_max)
    if loss_z_max is not None:
        _checks.scalar(_checks.positive, loss_z_max=loss_z_max)
    _checks.positive_integer(window_size=window_size)
    if window_size < 2:
        raise ValueError(f"window_size must be an integer >= 2, got {shown(window_size)}.")
    first = _checks.warmup(warmup_steps, window_size)
    ranges = _checked_ranges(skip_ranges)

    def init_fn(params: Updates) -> SkipState:
        zero = _placement.zero_norms(global_norm, params, axis_name=axis_name)

        def window(z: jax.typing.ArrayLike | None) -> Any:
            return optax.EmptyState() if z is None else _window.empty(window_size, zero)

        # Separate arrays, because a buffer can be donated only once.
        counts = zero.astype(jnp.int32), zero.astype(jnp.int32), zero.astype(jnp.int32)
        windows = window(z_max), window(loss_z_max)
        return SkipState(zero, zero != 0, *counts, limit.init(zero), *windows, inner.init(params))

    def update_fn(
        updates: Updates,
        state: SkipState,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, SkipState]:
        given = extra_args.get("norm")
        norm = (
            global_norm(updates, axis_name=axis_name).astype(state.norm.dtype)
            if given is None
            else _norm_trees.known(given, state.norm)
        )
        loss = None if loss_z_max is None else _given_loss(norm, extra_args.get("loss"))
        is_finite = jnp.isfinite(norm) & (True if loss is None else jnp.isfinite(loss))
        bound, threshold = limit.update(norm, state.threshold)
        is_large, norm_window = _watch(state.norm_window, norm, z_max, first)
        is_lost, loss_window = _watch(state.loss_window, loss, loss_z_max, first)
        is_chosen = _is_in(ranges, state.step_count)
        is_bad = ~(is_finite & (norm <= bound)) | is_large | is_lost
        is_skipped = is_bad | is_chosen
        threshold, norm_window, loss_window = _choice.choose(
            is_finite & ~is_chosen,
            (threshold, norm_window, loss_window),
            (state.threshold, state.norm_window, state.loss_window),
        )
        new_updates, inner_state = _select.update_if(
            ~is_skipped, inner.update, updates, state.inner_state, params, **extra_args
        )
        in_a_row = jnp.where(is_bad, optax.safe_increment(state.consecutive_count), 0)

        def leave_out(leaf: Any) -> Any:
            return _choice.choose(is_skipped, _neutral(leaf), leaf)

        # Leaf by leaf, because a class that checks the shapes of its leaves must never hold a
        # scalar zero.
        return jax.tree.map(leave_out, new_updates), SkipState(
            norm,
            is_skipped,
            _counted(is_skipped, state.skipped_count),
            jnp.where(is_chosen, state.consecutive_count, in_a_row),
            _counted(~is_skipped, state.taken_count),
            threshold,
            norm_window,
            loss_window,
            inner_state,
        )

    return transformation(init_fn, update_fn, SkipState)


def _counted(happened: Array, count: Array) -> Array:
    return jnp.where(happened, optax.safe_increment(count), count)


def _checked_ranges(skip_ranges: Any) -> np.ndarray:
    """The pairs as an array of two rows, the starts and the stops."""
    _checks.static(skip_ranges=skip_ranges)
    is_iterable = isinstance(skip_ranges, Iterable) and getattr(skip_ranges, "ndim", 1) > 0
    pairs = [_pair(item) for item in skip_ranges] if is_iterable else [None]
    if None in pairs:
        raise ValueError(
            "skip_ranges must be pairs (start, stop) of integers with 0 <= start < stop, as"
            f" ((100, 110), (250, 251)), got {shown(skip_ranges)}."
        )
    last = np.iinfo(np.int32).max
    clipped = [[min(number, last) for number in pair] for pair in pairs if pair]
    return np.array(clipped, np.int32).reshape(-1, 2).T


def _pair(item: Any) -> tuple[int, int] | None:
    """The item as a range of steps, or None if it is not one."""
    if not isinstance(item, Sequence | np.ndarray) or isinstance(item, range) or len(item) != 2:
        return None
    start, stop = item
    for number in item:
        if isinstance(number, bool) or not isinstance(number, (int, np.integer)):
            return None
    return (int(start), int(stop)) if 0 <= start < stop else None


def _is_in(ranges: np.ndarray, step: Array) -> Array:
    starts, stops = ranges
    return jnp.any((starts <= step) & (step < stops))


_NUMBERS = (int, float, np.generic, np.ndarray, jax.Array)


def _given_loss(norm: Array, loss: Any) -> Array:
    if loss is None:
        raise ValueError(
            "loss_z_max needs the loss of every step:"
            " call update(updates, state, params, loss=loss)."
        )
    is_real = isinstance(loss, _NUMBERS) and not jnp.iscomplexobj(loss)
    if not is_real or jnp.ndim(loss) != 0:
        raise ValueError(f"loss must be one real number, got {shown(loss)}.")
    return jnp.asarray(loss).astype(norm.dtype)


def _watch(
    window: Any, value: Array | None, z_max: jax.typing.ArrayLike | None, first: int
) -> tuple[Array | bool, Any]:
    """Whether a value is a spike against the window, and the window with the value added."""
    if value is None or z_max is None:
        return False, window
    mean, std = _window.mean_and_std(window, ddof=1)
    (times,) = _leaves.in_dtype_of(value, z_max)
    is_known = window.value_count >= max(first - 1, 2)
    return is_known & (value - mean > times * std), _window.push(window, value)


def _neutral(leaf: Any) -> Any:
    """The update that leaves a parameter unchanged when it is added."""
    if not _leaves.holds_numbers(leaf):
        return leaf
    zero = np.zeros((), jnp.asarray(leaf).dtype)
    # -0.0 + 0.0 is 0.0, and -0.0 + -0.0 is -0.0.
    return -zero if _leaves.is_measured(leaf) else zero
