"""Clip21: clips the distance of the updates from a running estimate."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _choice, _kinds, _moments, _select
from clipax._core._range import for_one_read
from clipax._core._transformation import transformation
from clipax._core._typing import Array, AxisName, Updates
from clipax.norms import leaf_norm


class Clip21State(NamedTuple):
    """The memory of `clip21`."""

    estimate: Updates
    """The running estimate, which came out last; float32, float64 or complex."""
    inner_state: Any


def clip21(
    inner: optax.GradientTransformation, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Moves a running estimate of the updates by clipped steps and returns it.

    `v <- v + clip(u - v)` from `v = 0`, and `v` comes out. If the updates settle, the estimate
    reaches them and the clip leaves no bias. After n steps of any finite updates, half of a usual
    norm passes within n + 1 steps if it is no longer than the bound, because each step moves the
    estimate by at most one bound.

    With several workers, as in the paper, each has its own state and the optimizer takes the mean:

        clipped, states = jax.vmap(clip.update)(updates_of_workers, states)
        updates = jax.tree.map(lambda leaf: leaf.mean(0), clipped)

    Args:
      inner: The clip of the difference: `clip_by_global_norm(1.0)`, as in the paper, or another.
      axis_name: As in `clip_by_global_norm`, for the test whether the updates are finite.

    Returns:
      A transformation with a `Clip21State`: the estimate in the structure of the parameters, and
      the inner state, from which `clipax.metrics` reads the norm of the difference. An extra
      argument `norm=` is not passed on, because it is not that norm.

    Raises:
      ValueError: `inner` is not a transformation; at `update`, the updates have another structure
        than at `init`.

    | updates | result |
    |---|---|
    | difference within the bound | the updates, bit for bit |
    | zero, after others | the estimate, on its way back to zero |
    | a NaN or inf entry | the estimate plus what `inner` makes of it; the state stays |
    | the difference overflows | as if it were the largest float; the state stays |
    | float16, bfloat16 | computed wide, then rounded; the estimate is not rounded |
    | None, integer, bool, float0 leaf | unchanged; nothing is kept |

    Differences from the paper: entries whose difference is not clipped come out exactly, without
    the rounding of `v + (u - v)`; the estimate survives a step that is not finite.

    Example:
      >>> clip = clip21(clip_by_global_norm(1.0))
      >>> state = clip.init(jnp.zeros(1))
      >>> for _ in range(4):
      ...     clipped, state = clip.update(jnp.array([2.5]), state)
      ...     print(clipped)
      [1.]
      [2.]
      [2.5]
      [2.5]

    References:
      Khirirat et al., 2023, https://arxiv.org/abs/2305.18929
    """
    inner = _checks.transformation(inner=inner)
    _checks.axis_name(axis_name=axis_name)

    def init_fn(params: Updates) -> Clip21State:
        return Clip21State(_moments.zeros(params), inner.init(_moments.zeros(params)))

    def update_fn(
        updates: Updates,
        state: Clip21State,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, Clip21State]:
        extra_args.pop("norm", None)
        wide = _moments.widened(updates, state.estimate)
        moves = _kinds.map_alike(_within_range, wide, state.estimate)
        clipped, inner_state = inner.update(moves, state.inner_state, params, **extra_args)
        # These reads are only for the sum, so that XLA keeps nothing of them for later use.
        leaves, treedef = jax.tree.flatten((wide, state.estimate))
        read = jax.tree.unflatten(treedef, for_one_read(leaves))
        zeros = leaf_norm(_kinds.map_alike(_zero_if_finite, *read), 1, axis_name=axis_name)
        is_finite = _moments.none_is_nan(zeros, axis_name=axis_name)

        def learn(estimate: Updates) -> Updates:
            return _kinds.map_alike(_moved, estimate, wide, clipped)

        moved, kept = _select.learned_if(is_finite, learn, state.estimate)
        inner_state = _choice.choose(is_finite, inner_state, state.inner_state)
        return _moments.narrowed(moved, updates), Clip21State(kept, inner_state)

    return transformation(init_fn, update_fn, Clip21State)


def _within_range(update: Array, estimate: Array) -> Array:
    return _moments.added(update, -estimate)


def _zero_if_finite(update: Array, estimate: Array) -> Array:
    return _moments.zero_or_nan(update - estimate)


def _moved(estimate: Array, update: Array, clipped: Array) -> Array:
    # A move that was not clipped arrives at the update exactly, -0.0 included; the rounded sum
    # need not.
    is_whole = clipped == _within_range(update, estimate)
    moved = estimate + clipped
    return _moments.with_derivative_of(jnp.where(is_whole, update, moved), moved)
