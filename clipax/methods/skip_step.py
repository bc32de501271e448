"""Steps of a whole optimizer that are left out where a norm or a loss is too large."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipax._core import _checks, _leaves, _select, _window
from clipax._core._transformation import injectable, transformation
from clipax._core._typing import Array, AxisName, Bound, Updates
from clipax.norms import global_norm
from clipax.thresholds import bounded


class SkipState(NamedTuple):
    """What was skipped, and what the next steps are held against."""

    norm: Array
    """The global L2 norm of the last updates as they came in; it may be NaN or inf."""
    is_skipped: Array
    """Whether the last step was skipped; bool."""
    skipped_count: Array
    """How many steps were skipped in all; int32."""
    consecutive_count: Array
    """How many in a row up to the last one, without those of `skip_ranges`; int32."""
    taken_count: Array
    """How many steps were not skipped; int32."""
    threshold: Any
    """The state of the rule that gives `skip_above`."""
    norm_window: Any
    """The last finite norms, where there is a `z_max`."""
    loss_window: Any
    """The last losses, where there is a `loss_z_max`."""
    inner_state: Any

    @property
    def step_count(self) -> Array:
        """How many steps there were in all: the number of the next one."""
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
    """Skips a whole step of an optimizer whose gradient is not finite, or a spike.

    A step is skipped if `norm`, the global L2 norm of the updates that come in, is NaN or
    inf, if `norm > skip_above`, or if `norm - mean > z_max * max(std, 1e-6 * |mean|)` over the
    window of the last finite norms; `std` is the sample's, over `n - 1`. `loss_z_max` is the
    same rule for losses. A skipped step gives zeros and keeps the inner state.

    It goes round the whole optimizer, the clip too, since behind a clip there are no spikes:
    `skip_step(optax.chain(clip_by_global_norm(1.0), optax.adam(1e-3)), z_max=6.0)`. It goes
    round `optax.MultiSteps`, whose sum never gets rid of a NaN.

    Args:
      inner: A whole optimizer, or any transformation.
      skip_above: Above it a step is skipped, > 0: a number, a scalar array or a schedule
        `count -> value` that counts the steps with a finite norm, skipped or not. None is
        never.
      z_max: How many standard deviations above the mean a norm may lie, > 0. None leaves
        out this rule and its window. OLMo-core has 6.
      loss_z_max: The same for the loss, which then is the extra argument `loss=` of every
        `update`, one number, the same on all devices.
      window_size: How many of the last values are remembered, >= 2; one float each.
        OLMo-core has 128.
      warmup_steps: From which value on, the current one counted, the rules with a window
        apply, >= 1, but never before the third. None is half the window.
      skip_ranges: Steps to skip whatever they are, as pairs `(start, stop)` with
        `0 <= start < stop`: the steps `start, ..., stop - 1`, where the first call of
        `update` is step 0 and every call counts. Pairs may overlap.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `SkipState` round the inner state; its norms are
      float32 or float64 (where a parameter is). `update` passes extra arguments on, `loss`
      too.

    Raises:
      ValueError: `inner` is no transformation; `skip_above`, `z_max` or `loss_z_max` is not
        > 0, `window_size` not an integer >= 2, `warmup_steps` not an integer >= 1, or
        `skip_ranges` not such pairs; at `update`, there is no `loss` and a `loss_z_max`, or
        it is no scalar.

    The windows learn every value of a step whose norm and, with `loss_z_max`, loss are
    finite, also of a skipped step: a new level becomes the usual one after a few steps, and
    nothing is skipped for ever. Whatever finite norms came before, under `z_max=6` half of a
    usual norm passes within 5 steps, and under the smallest `z_max` within `window_size + 1`.

    | step | result |
    |---|---|
    | not skipped | what `inner` gives, bit for bit; compiled alone, it may round otherwise |
    | skipped | -0.0 everywhere, which leaves a parameter as it is, -0.0 too |
    | skipped, an integer or bool leaf | 0 or False |
    | skipped, a None, MaskedNode, float0, PRNG-key leaf, or no array at all | as it is |
    | a norm or watched loss of NaN or inf, however many in a row | skipped; not learned |
    | in a pair of `skip_ranges` | skipped; not learned, nor counted by a schedule |
    | in a pair, between skipped steps | neither counts as one in a row nor ends the row |
    | the first, whatever its finite norm | taken, if it is not above `skip_above` |
    | one above a window of equal norms | skipped, if by more than a share of `1e-6 * z_max` |
    | one below the mean | taken |
    | a bound that turns out NaN | skipped |

    The steps are counted in the state, so that a run goes on from a checkpoint with other
    `skip_ranges`, and leaves out a batch that is known by then to be bad.
    `check_not_stuck` stops a run that skips step after step.

    Derivatives exist where no watched value equals its bound, and are zero through a skipped
    step. Where that step held a NaN, those in reverse mode are NaN.

    Differences from OLMo-core's `SkipStepOptimizer`: values that are not finite stay out of
    the windows, where they would have all steps skipped; the state is kept by a choice, not
    by a product with zero, which NaN survives; the spread of equal values has a floor; one
    past value judges nothing; norms can be watched without the loss. And unlike
    `optax.apply_if_finite`, it never lets a NaN through.

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
        raise ValueError(f"window_size must be an integer >= 2, got {window_size!r}.")
    first = _checks.warmup(warmup_steps, window_size)
    ranges = _checked_ranges(skip_ranges)

    def init_fn(params: Updates) -> SkipState:
        norm = functools.partial(global_norm, axis_name=_leaves.names_bound_here(axis_name))
        zero = _leaves.zero_norms(norm, _leaves.only_measured(params))

        def window(z: jax.typing.ArrayLike | None) -> Any:
            return optax.EmptyState() if z is None else _window.empty(window_size, zero)

        # Arrays of their own, since a buffer can be donated only once.
        counts = zero.astype(jnp.int32), zero.astype(jnp.int32), zero.astype(jnp.int32)
        windows = window(z_max), window(loss_z_max)
        return SkipState(zero, zero != 0, *counts, limit.init(zero), *windows, inner.init(params))

    def update_fn(
        updates: Updates,
        state: SkipState,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, SkipState]:
        norm = global_norm(updates, axis_name=axis_name).astype(state.norm.dtype)
        loss = None if loss_z_max is None else _given_loss(norm, extra_args.get("loss"))
        is_finite = jnp.isfinite(norm) & (True if loss is None else jnp.isfinite(loss))
        bound, threshold = limit.update(norm, state.threshold)
        is_large, norm_window = _watch(state.norm_window, norm, z_max, first)
        is_lost, loss_window = _watch(state.loss_window, loss, loss_z_max, first)
        is_chosen = _is_in(ranges, state.step_count)
        is_bad = ~(is_finite & (norm <= bound)) | is_large | is_lost
        is_skipped = is_bad | is_chosen
        threshold, norm_window, loss_window = _leaves.choose(
            is_finite & ~is_chosen,
            (threshold, norm_window, loss_window),
            (state.threshold, state.norm_window, state.loss_window),
        )
        new_updates, inner_state = _select.update_if(
            ~is_skipped, inner.update, updates, state.inner_state, params, **extra_args
        )
        in_a_row = jnp.where(is_bad, optax.safe_increment(state.consecutive_count), 0)

        def leave_out(leaf: Any) -> Any:
            return _leaves.choose(is_skipped, _neutral(leaf), leaf)

        # Leaf by leaf: a class that checks the shape of what it holds sees no zero alone.
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
    """The pairs as two rows of an array: where ranges start, and where they stop."""
    _checks.static(skip_ranges=skip_ranges)
    is_iterable = isinstance(skip_ranges, Iterable) and getattr(skip_ranges, "ndim", 1) > 0
    pairs = [_pair(item) for item in skip_ranges] if is_iterable else [None]
    if None in pairs:
        raise ValueError(
            "skip_ranges must be pairs (start, stop) of integers with 0 <= start < stop, as"
            f" ((100, 110), (250, 251)), got {skip_ranges!r}."
        )
    last = np.iinfo(np.int32).max
    clipped = [[min(number, last) for number in pair] for pair in pairs if pair]
    return np.array(clipped, np.int32).reshape(-1, 2).T


def _pair(item: Any) -> tuple[int, int] | None:
    """A range of steps, or None where this is none."""
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
        raise ValueError(f"loss must be one real number, got {loss!r}.")
    return jnp.asarray(loss).astype(norm.dtype)


def _watch(
    window: Any, value: Array | None, z_max: jax.typing.ArrayLike | None, first: int
) -> tuple[Array | bool, Any]:
    """Whether a value is a spike over those in the window, and the window with it."""
    if value is None or z_max is None:
        return False, window
    mean, std = _window.mean_and_std(window, ddof=1)
    (times,) = _leaves.in_dtype_of(value, z_max)
    is_known = window.value_count >= max(first - 1, 2)
    return is_known & (value - mean > times * std), _window.push(window, value)


def _neutral(leaf: Any) -> Any:
    """What leaves a parameter as it is when it is added."""
    if not _leaves.holds_numbers(leaf):
        return leaf
    zero = np.zeros((), jnp.asarray(leaf).dtype)
    # Of -0.0, adding 0.0 would make 0.0.
    return -zero if _leaves.is_measured(leaf) else zero
