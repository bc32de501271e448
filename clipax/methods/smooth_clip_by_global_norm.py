"""Smooth clipping by the global norm."""

import optax

from clipax._core import _checks
from clipax._core._clip_by import clip_by
from clipax._core._transformation import injectable
from clipax._core._typing import AxisName, Bound, Coefficient, LeafRule
from clipax.coefficients import square_root
from clipax.norms import global_norm
from clipax.thresholds import fixed


@injectable
def smooth_clip_by_global_norm(
    max_norm: Bound,
    coefficient: Coefficient = square_root,
    *,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales all updates by one factor that falls smoothly as their norm grows.

    `u <- u * coefficient(norm, max_norm)` with the global L2 norm. For a norm `n` and a bound `c`,
    the clipped norm is

    * `n / sqrt(1 + (n / c)^2)` with `square_root`,
    * `n / (1 + n / c)` with `rational`, which shortens small updates the most,
    * `c * tanh(n / c)` with `tanh`, which is nearest to `clip_by_global_norm`.

    It grows with `n` towards `c` and has a derivative everywhere. Every update is scaled, even one
    far below the bound.

    Args:
      max_norm: The bound, >= 0: a number, a scalar array or a schedule `count -> value`.
      coefficient: `(norm, max_norm) -> factor`: one of the three, or your own.
      mask: As in `clip_by_global_norm`.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` of scalars. Its `update` accepts a known norm
      as the extra argument `norm=`.

    Raises:
      ValueError: `max_norm` is not a number >= 0; `coefficient` is not a function.

    | updates | max_norm | result |
    |---|---|---|
    | norm below the precision of max_norm | any | the updates, bit for bit |
    | zero | 0 | zeros |
    | any finite | 0 | zeros |
    | any finite | inf | the updates, bit for bit |
    | an inf entry | finite | NaN there, zero elsewhere |
    | a NaN entry | any | all NaN |
    | finite, but the norm overflows its dtype | finite | zeros |
    | masked out, None, integer, bool, float0 leaf | any | unchanged, not measured |

    Example:
      >>> clip = smooth_clip_by_global_norm(10.0)
      >>> updates = {"w": jnp.array([4.5, 6.0])}
      >>> clip.update(updates, clip.init(updates))[0]
      {'w': Array([3.6000001, 4.8      ], dtype=float32)}

    References:
      Bu, Wang, Zha, Karypis, 2022, https://arxiv.org/abs/2206.07136 (a relative of `rational`)
    """
    _checks.one_bound(_checks.non_negative, max_norm=max_norm)
    _checks.function(coefficient=coefficient)
    return clip_by(global_norm, fixed(max_norm), coefficient, mask=mask, axis_name=axis_name)
