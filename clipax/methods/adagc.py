"""AdaGC: bounds each leaf by an average of its own norms."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _kinds, _leaves, _patience
from clipax._core._clip_by import clip_by
from clipax._core._scaling import in_two
from clipax._core._transformation import injectable
from clipax._core._typing import Array, AxisName, LeafRule, Norms
from clipax.coefficients import hard
from clipax.norms import global_norm, leaf_norm
from clipax.thresholds import Threshold


class AdaGCState(NamedTuple):
    """The history of `adagc`, in the structure of its norms."""

    average: Norms
    """The running average of each leaf's norm; 0 before its first nonzero norm."""
    step_count: Array
    """The number of steps with a finite global norm; int32."""
    halved_count: Norms
    """How many of each leaf's norms in a row were more than twice their bounds; int32."""


@injectable
def adagc(
    ratio: jax.typing.ArrayLike = 1.05,
    *,
    decay: jax.typing.ArrayLike = 0.98,
    warmup_max_norm: jax.typing.ArrayLike = 1.0,
    warmup_steps: int = 100,
    raw_history: bool = False,
    stack_axis: LeafRule = None,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds each leaf's norm by a multiple of its own running average.

        max_norm_l = ratio * average_l
        average_l <- decay * average_l + (1 - decay) * min(norm_l, max_norm_l)

    For the first `warmup_steps`, one factor `h = min(1, warmup_max_norm / global_norm)` scales all
    leaves instead, and `average_l <- min(average_l, h * norm_l)`.

    The current norm does not count in its own bound. After any finite norms, half of a usual norm
    passes within 300 steps: the warm-up, and 200 norms in a row above twice their bounds, after
    which a leaf forgets its average.

    Args:
      ratio: The bound over the average, > 0. The paper has 1.03 to 1.05.
      decay: The weight of the past in the average, in [0, 1). The paper has 0.98 to 0.99.
      warmup_max_norm: The bound on the global norm during warm-up, > 0. The paper has 1.0.
      warmup_steps: How many steps are clipped by their global norm, >= 1. The paper has 100.
      raw_history: Whether the averages learn norms before clipping. By default they learn clipped
        norms, as in the paper, and sink where norms scatter much, until most steps are clipped.
      stack_axis: The axis along which layers are stacked, as in `clip_by_leaf_norm`.
      mask: Which leaves are clipped and count in the global norm, as in `clip_by_global_norm`.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` with a scalar per leaf, or an array with one
      entry per stacked layer that broadcasts against the leaf. Its threshold holds averages and
      counts.

    Raises:
      ValueError: An argument is out of its range or not a number, or `raw_history` is not a
        boolean; at `init` and `update`, a prefix does not fit or a leaf lacks an axis.

    | leaf | result |
    |---|---|
    | warm-up, global norm <= warmup_max_norm | the leaf, bit for bit |
    | norm <= ratio * average | the leaf, bit for bit |
    | zero | zeros; the average stays |
    | zero in every step so far | its first nonzero norm is bounded as in warm-up |
    | clipped to less than half 200 times in a row | the next norm is bounded as in warm-up |
    | NaN or inf after warm-up | as under a fixed bound; its average stays, other leaves go on |
    | NaN or inf in warm-up | as under a fixed global bound; all averages and the count stay |
    | only NaN or inf so far | warm-up |

    Derivatives are finite, and exist where no norm equals its bound.

    Differences from the paper: zero norms are not learned, and an average far below its leaf's
    norms is forgotten. Either would hold the leaf near zero for ever.

    Example:
      >>> clip = adagc(1.5, warmup_max_norm=100.0, warmup_steps=1)
      >>> state = clip.init({"w": jnp.zeros(1), "b": jnp.zeros(1)})
      >>> for w, b in ((2.0, 4.0), (6.0, 5.0)):
      ...     clipped, state = clip.update({"w": jnp.array([w]), "b": jnp.array([b])}, state)
      >>> clipped
      {'b': Array([5.], dtype=float32), 'w': Array([3.], dtype=float32)}

    References:
      Wang et al., 2025, https://arxiv.org/abs/2502.11034
    """
    _checks.scalar(_checks.finite_positive, ratio=ratio)
    _checks.scalar(_checks.positive, warmup_max_norm=warmup_max_norm)
    _checks.scalar(_checks.decay_rate, decay=decay)
    _checks.positive_integer(warmup_steps=warmup_steps)
    _checks.flag(raw_history=raw_history)
    _checks.axes(stack_axis=stack_axis)
    _checks.static(mask=mask)

    # The leaf norms already cover all shards, so their sum must not be reduced again.
    norm_of_all = functools.partial(global_norm, axis_name=None if axis_name is None else ())

    def init_fn(norms: Norms) -> AdaGCState:
        averages = jax.tree.map(lambda norm: norm + 0, norms)
        counts = jax.tree.map(lambda norm: norm.astype(jnp.int32), norms)
        return AdaGCState(averages, norm_of_all(norms).astype(jnp.int32), counts)

    def update_fn(norms: Norms, state: AdaGCState, params: Any = None, **extra: Any) -> Any:
        del params, extra
        total = norm_of_all(norms)
        is_finite = jnp.isfinite(total)
        start = in_two(hard, total, *_leaves.in_dtype_of(total, warmup_max_norm))
        is_warmed_up = state.step_count >= warmup_steps

        def follows_itself(average: Array) -> Array:
            return is_warmed_up & (average > 0)

        def bound(norm: Array, average: Array) -> Array:
            first, second = _leaves.in_dtype_of(norm, *start)
            # The `where` keeps inf * 0 = NaN out of the bound.
            at_start = jnp.where(second == 0, 0, norm) * first * second
            (share,) = _leaves.in_dtype_of(norm, ratio)
            return jnp.where(follows_itself(average), share * average, at_start)

        def learns(norm: Array, average: Array) -> Array:
            return (norm > 0) & jnp.isfinite(norm) & (follows_itself(average) | is_finite)

        def count_halved(norm: Array, average: Array, bound: Array, count: Array) -> Array:
            own = jnp.where(follows_itself(average), bound, jnp.inf)
            counted = _patience.count_halved(count, norm, own)
            return jnp.where(learns(norm, average), counted, count)

        def learn(norm: Array, average: Array, bound: Array, count: Array) -> Array:
            value = norm if raw_history else jnp.minimum(norm, bound)
            smallest = jnp.where(average > 0, jnp.minimum(average, value), value)
            old, new = _leaves.in_dtype_of(norm, decay, 1 - decay)
            moved = old * average + new * value
            learned = jnp.where(follows_itself(average), moved, smallest)
            learned = jnp.where(count >= _patience.PATIENCE, 0, learned)
            return jnp.where(learns(norm, average), learned, average)

        def step(norm: Array, average: Array, count: Array) -> tuple[Array, Array, Array]:
            max_norm = bound(norm, average)
            count = count_halved(norm, average, max_norm, count)
            return max_norm, learn(norm, average, max_norm, count), count

        bounds, averages, counts = _kinds.map_in_rows(
            _kinds.once_per_kind(step), norms, state.average, state.halved_count, width=3
        )
        count = jnp.where(is_finite, optax.safe_increment(state.step_count), state.step_count)
        return bounds, AdaGCState(averages, count, counts)

    norm = functools.partial(leaf_norm, stack_axis=stack_axis, mask=mask)
    return clip_by(norm, Threshold(init_fn, update_fn), axis_name=axis_name)
