"""Clipping each entry."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _leaves, _rules
from clipax._core._clip_by import ClipState, clip_by
from clipax._core._scaling import in_two
from clipax._core._transformation import transformation
from clipax._core._typing import Array, AxisName, Bound, Norms, Updates
from clipax.coefficients import hard
from clipax.norms import leaf_norm
from clipax.thresholds._fixed import bounded


def clip_by_value(
    max_value: Bound, min_value: Bound | None = None, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Clips each entry to `[min_value, max_value]`.

    `u_i <- min(max(u_i, min_value), max_value)`. A complex entry is clipped by its modulus and
    keeps its phase: `u_i <- u_i * min(1, max_value / |u_i|)`.

    Args:
      max_value: The upper bound, >= 0: a number, a scalar array, a schedule `count -> value`, or a
        tree prefix of them.
      min_value: The lower bound, <= 0, in the same forms; None is `-max_value`. Zero is always
        within the bounds, so a zero gradient stays zero.
      axis_name: As in `clip_by_global_norm`; it affects the recorded norm only.

    Returns:
      A transformation whose state is a `ClipState` with a scalar per leaf: `norm` is the largest
      modulus of an entry, `max_norm` is the bound's, and `coefficient` is the smallest factor of
      an entry. With `min_value`, each is a pair, for positive and for negative entries.

    Raises:
      ValueError: A value in `max_value` is not a number >= 0, or in `min_value` not a number <= 0;
        at `init` and `update`, a prefix does not fit, or `min_value` is given for a complex leaf.

    | entry | result |
    |---|---|
    | within the bounds | unchanged, bit for bit |
    | inf, -inf | the bound |
    | complex with an infinite part | NaN |
    | NaN | NaN; other entries unharmed |
    | any, with bounds of 0 | 0 |
    | None, integer, bool, float0 leaf | unchanged, not measured |

    Example:
      >>> clip = clip_by_value(1.0)
      >>> updates = jnp.array([3.0, -0.5, -4.0])
      >>> clip.update(updates, clip.init(updates))[0]
      Array([ 1. , -0.5, -1. ], dtype=float32)

    References:
      Pan, Li, 2023, https://arxiv.org/abs/2306.00204 (coordinate-wise clipping)
    """
    upper = bounded(_checks.non_negative, max_value=max_value)
    if min_value is None:
        sides = [clip_by(_largest, upper, axis_name=axis_name)]
    else:
        lower = bounded(_checks.non_positive, is_lower=True, min_value=min_value)
        sides = [
            clip_by(_largest_positive, upper, axis_name=axis_name),
            clip_by(_largest_negative, lower, axis_name=axis_name),
        ]

    def both(states: list[ClipState]) -> ClipState:
        if len(states) == 1:
            return states[0]
        return ClipState(*(tuple(field) for field in zip(*states, strict=True)))

    def each(state: Any) -> list[Any]:
        if len(sides) == 1 or not isinstance(state, ClipState):
            return [state] * len(sides)
        return [ClipState(*fields) for fields in zip(*state, strict=True)]

    def init_fn(params: Updates) -> ClipState:
        return both([side.init(params) for side in sides])

    def update_fn(
        updates: Updates, state: ClipState, params: Updates | None = None, **extra_args: Any
    ) -> tuple[Updates, ClipState]:
        del params, extra_args
        # The sides only record: under jit, the updates that they scale are never computed.
        pairs = zip(sides, each(state), strict=True)
        states = [side.update(updates, side_state)[1] for side, side_state in pairs]
        tops, bottoms = states[0].max_norm, states[-1].max_norm
        return _leaves.map_measured(_clip_leaf, updates, tops, bottoms), both(states)

    return transformation(init_fn, update_fn)


def clip(max_value: Bound, *, axis_name: AxisName = None) -> optax.GradientTransformationExtraArgs:
    """Clips each entry to `[-max_value, max_value]`: optax's name for `clip_by_value`.

    Args:
      max_value: As in `clip_by_value`.
      axis_name: As in `clip_by_value`.

    Returns:
      The transformation `clip_by_value(max_value)`.

    Raises:
      ValueError: As `clip_by_value`.

    Example:
      >>> transformation = clip(1.0)
      >>> updates = jnp.array([3.0, -0.5])
      >>> transformation.update(updates, transformation.init(updates))[0]
      Array([ 1. , -0.5], dtype=float32)
    """
    return clip_by_value(max_value, axis_name=axis_name)


def _largest(updates: Updates, **axis_name: Any) -> Norms:
    return leaf_norm(updates, math.inf, **axis_name)


def _largest_positive(updates: Updates, **axis_name: Any) -> Norms:
    parts = jax.tree.map(_positive_part, _rules.only_measured(updates))
    return leaf_norm(parts, math.inf, **axis_name)


def _largest_negative(updates: Updates, **axis_name: Any) -> Norms:
    mirrored = jax.tree.map(jnp.negative, _rules.only_measured(updates))
    return _largest_positive(mirrored, **axis_name)


def _positive_part(leaf: Any) -> Array:
    if jnp.iscomplexobj(leaf):
        raise ValueError(
            "min_value must be None for complex leaves, which are clipped by their modulus."
        )
    return jnp.maximum(leaf, 0)


def _clip_leaf(leaf: Any, top: Array, bottom: Array) -> Array:
    leaf = jnp.asarray(leaf)
    if jnp.iscomplexobj(leaf):
        moduli = jnp.abs(leaf)
        bounds = top.astype(moduli.dtype) + jnp.zeros_like(moduli)
        return in_two(hard, moduli, bounds).scale(leaf)
    wide = _leaves.wide_dtype(leaf.dtype, top.dtype)
    lowest, highest = -bottom.astype(wide), top.astype(wide)
    return jnp.clip(leaf.astype(wide), lowest, highest).astype(leaf.dtype)
