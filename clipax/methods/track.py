"""Running statistics of a clip, for logs of every n-th step."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _choice, _leaves, _moments, _paths, _placement, _rules
from clipax._core._clip_by import ClipState
from clipax._core._shown import shown
from clipax._core._transformation import transformation
from clipax._core._typing import Array, AxisName, Updates
from clipax.norms import global_norm


class TrackState(NamedTuple):
    """What the wrapped clip did since `init` or the last `reset_tracking`."""

    step_count: Array
    """How many steps had a finite norm. All other statistics are of these; int32."""
    clipped_count: Array
    """How many of these steps changed an update; int32."""
    skipped_count: Array
    """How many steps had a norm of NaN or inf. No other statistic counts them; int32."""
    mean_norm: Array
    """The mean norm before clipping."""
    largest_norm: Array
    """The largest norm before clipping."""
    mean_removed: Array
    """The mean of what clipping takes off the norm, which counts as 0 where the norm grows."""
    mean_coefficient: Array
    """The mean of the norm after clipping over the norm before it."""
    group_mean_norm: dict[str, Array]
    """The mean norm of each group before clipping."""
    group_largest_norm: dict[str, Array]
    """The largest norm of each group before clipping."""
    inner_state: Any


def track(
    inner: optax.GradientTransformation,
    *,
    groups: Sequence[str] | Callable[[str, Any], str | None] = (),
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Keeps statistics of a clip over the steps since they were last reset.

    `mean <- mean + (x - mean) / step_count` for each finite `x`: the norm before clipping, the
    part of it that is removed, and the coefficient. `clipax.metrics` reads the means, so that a
    log of every fiftieth step covers all fifty, and `reset_tracking` starts them again.

    Wrap the clip alone. Around a whole optimizer, the norms after it are those of its steps.

    Args:
      inner: A clip, or any transformation.
      groups: Leaves whose norm is tracked by itself: paths such as "encoder", each with all
        leaves under it, or a function `(path, leaf) -> name`, which returns None for a leaf in
        no group.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      `inner` with its state inside a `TrackState` of scalars, in float32, or float64 where a
      parameter is. If `inner` has one norm for all leaves, its norm and coefficient are used.
      Otherwise the norm is the global L2 norm before it, and the coefficient is the norm after
      it over that norm.

    Raises:
      ValueError: `inner` is not a transformation, or `groups` is neither paths nor a function;
        at `init`, there is no leaf at a path, or the function returns neither a name nor None;
        at `update`, the state is missing.

    | step | result |
    |---|---|
    | any | what `inner` gives, bit for bit |
    | a norm of NaN or inf, before or after | counted as skipped, and in no other statistic |
    | zero updates | norm 0, coefficient 1 |
    | longer after `inner` than before | nothing removed; the coefficient is more than 1 |
    | none since the reset | counts, norms and removed share 0, coefficient 1 |

    Example:
      >>> clip = track(clip_by_global_norm(1.0))
      >>> state = clip.init(jnp.zeros(1))
      >>> for norm in (4.0, 1.0, 1.0):  # 3 of 6 are removed
      ...     _, state = clip.update(jnp.array([norm]), state)
      >>> values = metrics(state)
      >>> int(values["tracked/steps"]), int(values["tracked/steps_clipped"])
      (3, 1)
      >>> float(values["tracked/mean_norm"]), float(values["tracked/removed_share"])
      (2.0, 0.5)
    """
    inner = _checks.transformation(inner=inner)
    _checks.axis_name(axis_name=axis_name)
    _check(groups)

    def init_fn(params: Updates) -> TrackState:
        zero = _placement.zero_norms(global_norm, params, axis_name=axis_name)
        names_of_groups = _names(groups, _rules.only_measured(params))
        return TrackState(
            # Separate arrays, because a buffer can be donated only once.
            step_count=zero.astype(jnp.int32),
            clipped_count=zero.astype(jnp.int32),
            skipped_count=zero.astype(jnp.int32),
            mean_norm=zero,
            largest_norm=zero + 0,
            mean_removed=zero + 0,
            mean_coefficient=zero + 1,
            group_mean_norm={name: jnp.copy(zero) for name in names_of_groups},
            group_largest_norm={name: jnp.copy(zero) for name in names_of_groups},
            inner_state=inner.init(params),
        )

    def update_fn(
        updates: Updates,
        state: TrackState,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, TrackState]:
        new_updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        dtype = state.mean_norm.dtype
        before, after, is_clipped = _before_and_after(updates, new_updates, inner_state, axis_name)
        before, after = before.astype(dtype), after.astype(dtype)
        norms = {
            name: global_norm(updates, mask=_mask(groups, name), axis_name=axis_name).astype(dtype)
            for name in state.group_mean_norm
        }
        learned = _learned(state, before, after, is_clipped, norms)
        is_finite = jnp.isfinite(before) & jnp.isfinite(after)
        left_out = state._replace(skipped_count=optax.safe_increment(state.skipped_count))
        statistics = _choice.choose(
            is_finite, learned._replace(inner_state=None), left_out._replace(inner_state=None)
        )
        return new_updates, statistics._replace(inner_state=inner_state)

    return transformation(init_fn, update_fn, TrackState)


def reset_tracking(opt_state: Any) -> Any:
    """Starts the statistics of every `track` in an optimizer state again.

    It returns a new state and works inside and outside `jit`.

    Args:
      opt_state: Any pytree that holds states of `track`.

    Returns:
      The optimizer state with fresh statistics; everything else is unchanged.

    Raises:
      ValueError: `opt_state` holds no `TrackState`.

    | opt_state | result |
    |---|---|
    | several `TrackState`s, also one in another | each starts again |
    | of `jax.vmap`, or sharded | in the same shapes and sharding |

    Example:
      >>> clip = track(clip_by_global_norm(1.0))
      >>> _, state = clip.update(jnp.array([4.0]), clip.init(jnp.zeros(1)))
      >>> state = reset_tracking(state)
      >>> int(state.step_count), float(state.mean_coefficient)
      (0, 1.0)
    """
    is_found = False

    def is_state(node: Any) -> bool:
        return isinstance(node, TrackState)

    def fresh(node: Any) -> Any:
        nonlocal is_found
        if not is_state(node):
            return node
        is_found = True
        zeros = jax.tree.map(lambda leaf: leaf - leaf, node._replace(inner_state=None))
        inner_state = jax.tree.map(fresh, node.inner_state, is_leaf=is_state)
        return zeros._replace(mean_coefficient=zeros.mean_coefficient + 1, inner_state=inner_state)

    state = jax.tree.map(fresh, opt_state, is_leaf=is_state)
    if not is_found:
        raise ValueError("opt_state must hold a state of track, got one without.")
    return state


def _check(groups: Any) -> None:
    is_of_paths = isinstance(groups, list | tuple) and all(
        isinstance(each, str) for each in groups
    )
    if not (is_of_paths or callable(groups)):
        raise ValueError(
            "groups must be a list of paths, such as ['encoder', 'head'], or a function"
            f" (path, leaf) -> name, got {shown(groups)}."
        )


def _names(groups: Any, measured: Updates) -> list[str]:
    """The groups that a tree has leaves in."""
    leaves = zip(_paths.of_leaves(measured), jax.tree.leaves(measured), strict=True)
    if callable(groups):
        names = {groups(path, leaf) for path, leaf in leaves} - {None}
        for name in names:
            if not isinstance(name, str):
                raise ValueError(
                    f"groups must give a name or None for each leaf, got {shown(name)}."
                )
        return sorted(names)
    paths = [path for path, _ in leaves]
    for name in groups:
        if paths and not any(_mask(groups, name)(path, None) for path in paths):
            raise ValueError(f"groups must be paths of leaves, or above them, got {shown(name)}.")
    return list(groups)


def _mask(groups: Any, name: str) -> Callable[[str, Any], bool]:
    """Which leaves are in a group."""
    if callable(groups):
        return lambda path, leaf: bool(groups(path, leaf) == name)
    return lambda path, _: path == name or path.startswith(f"{name}/")


def _before_and_after(
    updates: Updates, new_updates: Updates, inner_state: Any, axis_name: AxisName
) -> tuple[Array, Array, Array]:
    """The norms before and after a transformation, and whether it changed anything."""
    if isinstance(inner_state, ClipState) and isinstance(inner_state.norm, jax.Array):
        norm, coefficient = inner_state.norm, inner_state.coefficient
        if norm.ndim == 0:  # The state has both, so nothing is measured again.
            return norm, jnp.where(coefficient == 1, norm, norm * coefficient), ~(coefficient >= 1)
    measure = functools.partial(global_norm, axis_name=axis_name)
    is_changed = measure(jax.tree.map(_changed, updates, new_updates), math.inf) > 0
    before, after = measure(updates), measure(new_updates)
    # Unchanged updates have one norm, however each was summed.
    return before, jnp.where(is_changed, after.astype(before.dtype), before), is_changed


def _changed(old: Any, new: Any) -> Any:
    if not (_leaves.is_measured(old) and _leaves.is_measured(new)):
        return None
    return (jnp.asarray(old) != jnp.asarray(new)).astype(jnp.float32)


def _learned(
    state: TrackState, before: Array, after: Array, is_clipped: Array, groups: dict[str, Array]
) -> TrackState:
    """The statistics with one step more."""
    count = optax.safe_increment(state.step_count)
    weight = 1 / count.astype(before.dtype)
    # The inner `where` keeps 0 / 0 out of the derivative.
    coefficient = jnp.where(before > 0, after / jnp.where(before > 0, before, 1), 1)
    clipped_count = optax.safe_increment(state.clipped_count)

    def mean(old: Array, new: Array) -> Array:
        return _moments.mean(old, new, weight)

    return state._replace(
        step_count=count,
        clipped_count=jnp.where(is_clipped, clipped_count, state.clipped_count),
        mean_norm=mean(state.mean_norm, before),
        largest_norm=jnp.maximum(state.largest_norm, before),
        mean_removed=mean(state.mean_removed, jnp.maximum(before - after, 0)),
        mean_coefficient=mean(state.mean_coefficient, coefficient),
        group_mean_norm=jax.tree.map(mean, state.group_mean_norm, groups),
        group_largest_norm=jax.tree.map(jnp.maximum, state.group_largest_norm, groups),
    )
