"""Clipping by the global norm with a least factor (delta-GClip)."""

import functools

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _leaves
from clipax._core._clip_by import clip_by
from clipax._core._typing import Array, AxisName, Bound, LeafRule
from clipax.coefficients import hard
from clipax.norms import global_norm
from clipax.thresholds import fixed


def delta_gclip(
    max_norm: Bound,
    delta: jax.typing.ArrayLike = 1e-3,
    *,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips by the global norm, but never by a factor below `delta`.

    `u <- u * min(1, max(delta, max_norm / norm))` with the global L2 norm. A norm above
    `max_norm / delta` is therefore not bounded by `max_norm`.

    Args:
      max_norm: The bound, >= 0: a number, a scalar array or a schedule `count -> value`.
      delta: The least factor, in (0, 1). The authors' published code has 1e-3.
      mask: As in `clip_by_global_norm`.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` of scalars. Its `update` accepts a known norm
      as the extra argument `norm=`.

    Raises:
      ValueError: `max_norm` is not a number >= 0, or `delta` not a number in (0, 1).

    | updates | max_norm | result |
    |---|---|---|
    | norm <= max_norm | any | the updates, bit for bit |
    | norm > max_norm / delta | any | `delta` times the updates, longer than max_norm |
    | any finite | 0 | `delta` times the updates |
    | any finite | inf | the updates, bit for bit |
    | an inf entry | finite | inf there, `delta` times the others |
    | a NaN entry | any | all NaN |
    | finite, but the norm overflows its dtype | finite | `delta` times the updates |
    | masked out, None, integer, bool, float0 leaf | any | unchanged, not measured |

    Example:
      >>> clip = delta_gclip(1.0, delta=0.25)
      >>> state = clip.init(jnp.zeros(2))
      >>> clip.update(jnp.array([0.0, 2.0]), state)[0]
      Array([0., 1.], dtype=float32)
      >>> clip.update(jnp.array([0.0, 80.0]), state)[0]
      Array([ 0., 20.], dtype=float32)

    References:
      Tucat et al., 2024, https://arxiv.org/abs/2404.08624
    """
    _checks.one_bound(_checks.non_negative, max_norm=max_norm)
    _checks.scalar(_checks.inside_unit_interval, delta=delta)
    coefficient = functools.partial(_hard_above, floor=delta)
    return clip_by(global_norm, fixed(max_norm), coefficient, mask=mask, axis_name=axis_name)


def _hard_above(norm: Array, max_norm: Array, *, floor: jax.typing.ArrayLike) -> Array:
    (lowest,) = _leaves.in_dtype_of(norm, floor)
    return jnp.maximum(hard(norm, max_norm), lowest)
