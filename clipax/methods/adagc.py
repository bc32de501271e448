"""AdaGC: each leaf against an average of its own norms."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _leaves, _patience
from clipax._core._clip_by import clip_by
from clipax._core._transformation import injectable
from clipax._core._typing import Array, AxisName, LeafRule, Norms
from clipax.coefficients import hard, in_two
from clipax.norms import global_norm, leaf_norm
from clipax.thresholds import Threshold


class AdaGCState(NamedTuple):
    average: Norms
    """The running average of each leaf's norm; 0 where there has been none."""
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

    For the first `warmup_steps`, all leaves are scaled by
    `h = min(1, warmup_max_norm / global_norm)`, and `average_l <- min(average_l, h * norm_l)`.
    After them, `max_norm_l = ratio * average_l`, and with `x_l = min(norm_l, max_norm_l)`,
    `average_l <- decay * average_l + (1 - decay) * x_l`.

    Clipped norms pull the average down: where norms scatter much, as with small batches,
    most steps are clipped. `raw_history` has no such bias.

    Whatever finite norms came before, half of a usual norm passes within 300 steps, those of
    the warm-up and 200 more: a leaf's average is forgotten after 200 of its norms in a row that
    were more than twice their bounds.

    Args:
      ratio: The bound on the norm over its average, > 0. The paper has 1.03 to 1.05.
      decay: The weight of the past in the average, in [0, 1). The paper has 0.98 to 0.99.
      warmup_max_norm: The bound on the global norm during warm-up, > 0. The paper has 1.0.
      warmup_steps: How many steps are clipped by their global norm, >= 1. The paper has
        100.
      raw_history: Whether the averages learn norms as they were before clipping; else as
        they are after it, as in the paper.
      stack_axis: The axis along which layers are stacked, as by `scan`, so that each
        layer has an average of its own. One value for every leaf, a tree prefix, or a
        function `(path, leaf) -> axis`; None where nothing is stacked.
      mask: Which leaves are clipped, and counted in the global norm: True, a tree prefix
        of booleans, or a function `(path, leaf) -> bool`.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` of trees with a scalar a leaf, or an
      array that broadcasts against it where layers are stacked; its threshold holds the
      averages and the counts.

    Raises:
      ValueError: A number is out of its range, NaN, boolean, None or a string, or
        `raw_history` no boolean; at `init` and `update`, a prefix does not fit or a leaf
        lacks an axis.

    | leaf | result |
    |---|---|
    | warm-up, global norm <= warmup_max_norm | the leaf, bit for bit |
    | norm <= ratio * average | the leaf, bit for bit |
    | zero | zeros; the average stays |
    | zero in every step so far | the first other norm is bounded as in warm-up |
    | clipped to less than half 200 times in a row | the next norm is bounded as in warm-up |
    | NaN or inf after warm-up | as for a fixed bound; its average stays, other leaves go on |
    | NaN or inf in warm-up | as for a fixed global bound; all averages and the count stay |
    | only NaN or inf so far | warm-up |

    Derivatives exist where no norm equals its bound. They are finite everywhere.

    Differences from the paper: a norm of zero never enters the average. There it does, and
    a leaf whose gradient is zero once during warm-up, as one behind a matrix that starts at
    zero, is clipped to zero for ever. The warm-up keeps the smallest norm, also a tiny one,
    and a clipped average grows by `(1 - decay) * (ratio - 1)` of itself a step: from a tiny
    one there it never recovers, and here it is forgotten. Differences from the
    authors' published code: during warm-up the averages take clipped norms, there raw ones;
    `warmup_steps` steps, there one more; no 1e-8 beside the norms.

    Example:
      >>> clip = adagc(1.5, warmup_max_norm=100.0, warmup_steps=1)
      >>> state = clip.init({"w": jnp.zeros(1), "b": jnp.zeros(1)})
      >>> for w, b in ((2.0, 4.0), (6.0, 5.0)):
      ...     clipped, state = clip.update({"w": jnp.array([w]), "b": jnp.array([b])}, state)
      >>> clipped
      {'b': Array([5.], dtype=float32), 'w': Array([3.], dtype=float32)}

    References:
      Wang et al., "AdaGC: improving training stability for large language model
      pretraining", 2025, https://arxiv.org/abs/2502.11034
    """
    _checks.scalar(_checks.finite_positive, ratio=ratio)
    _checks.scalar(_checks.positive, warmup_max_norm=warmup_max_norm)
    _checks.scalar(_checks.decay_rate, decay=decay)
    _checks.positive_integer(warmup_steps=warmup_steps)
    _checks.flag(raw_history=raw_history)
    _checks.axes(stack_axis=stack_axis)
    _checks.static(mask=mask)

    # Leaf norms are complete: no mapped axis is summed over again.
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
            # An infinite norm times zero is no bound.
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

        bounds = jax.tree.map(bound, norms, state.average)
        counts = jax.tree.map(count_halved, norms, state.average, bounds, state.halved_count)
        averages = jax.tree.map(learn, norms, state.average, bounds, counts)
        count = jnp.where(is_finite, optax.safe_increment(state.step_count), state.step_count)
        return bounds, AdaGCState(averages, count, counts)

    norm = functools.partial(leaf_norm, stack_axis=stack_axis, mask=mask)
    return clip_by(norm, Threshold(init_fn, update_fn), axis_name=axis_name)
