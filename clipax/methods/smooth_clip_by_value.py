"""Smooth clipping of each entry."""

import functools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from clipax._core import _checks, _leaves
from clipax._core._clip_by import ClipState, clip_by
from clipax._core._scaling import in_two, scale_updates
from clipax._core._transformation import injectable, transformation
from clipax._core._typing import Array, AxisName, Bound, Coefficient, Updates
from clipax.coefficients import tanh
from clipax.norms import leaf_norm
from clipax.thresholds._fixed import bounded

# Entries further above their bound count as this many times the bound, because their own factor
# would be subnormal and flushed to zero.
_FARTHEST = 2.0**64


@injectable
def smooth_clip_by_value(
    max_value: Bound, coefficient: Coefficient = tanh, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each entry smoothly into `[-max_value, max_value]`.

    `u_i <- u_i * coefficient(|u_i|, max_value)`. For a bound `c`, that is

    * `c * tanh(u_i / c)` with `tanh`, which is nearest to `clip_by_value`,
    * `u_i / sqrt(1 + (u_i / c)^2)` with `square_root`,
    * `u_i / (1 + |u_i| / c)` with `rational`, which shortens small entries the most.

    Every entry is scaled, even one far below the bound. A complex entry is scaled by its modulus
    and keeps its phase.

    Args:
      max_value: The bound, >= 0: a number, a scalar array, a schedule `count -> value`, or a tree
        prefix of them.
      coefficient: `(modulus, max_value) -> factor`: one of the three, or your own.
      axis_name: As in `clip_by_global_norm`; it affects the recorded norm only.

    Returns:
      A transformation whose state is a `ClipState` with a scalar per leaf: `norm` is the largest
      modulus of an entry, `max_norm` is the bound, and `coefficient` is the factor of that entry,
      the smallest.

    Raises:
      ValueError: A value in `max_value` is not a number >= 0; `coefficient` is not a function; at
        `init` and `update`, a prefix does not fit.

    | entry | result |
    |---|---|
    | below the precision of the bound | unchanged, bit for bit |
    | 0 | 0 |
    | inf, -inf | the bound |
    | beyond 2^64 times the bound, for a coefficient of your own | as 2^64 times the bound |
    | complex with an infinite part | NaN |
    | NaN | NaN; other entries unharmed |
    | any, with a bound of 0 | 0 |
    | any, with a bound of inf | unchanged, bit for bit |
    | None, integer, bool, float0 leaf | unchanged, not measured |

    Example:
      >>> clip = smooth_clip_by_value(1.0, rational)
      >>> updates = jnp.array([3.0, -1.0, 0.0])
      >>> clip.update(updates, clip.init(updates))[0]
      Array([ 0.75, -0.5 ,  0.  ], dtype=float32)

    References:
      Williamson, Eisenmann, Stillfjord, 2024, https://arxiv.org/abs/2406.16640
    """
    bound = bounded(_checks.non_negative, max_value=max_value)
    _checks.function(coefficient=coefficient)
    largest = functools.partial(leaf_norm, ord=math.inf)
    whole_leaves = clip_by(largest, bound, coefficient, axis_name=axis_name)

    def draw(leaf: Any, top: Array) -> Array:
        return _draw_leaf(leaf, top, coefficient)

    def update_fn(
        updates: Updates, state: ClipState, params: Updates | None = None, **extra_args: Any
    ) -> tuple[Updates, ClipState]:
        del params, extra_args
        # This one only records: under jit, the updates that it scales are never computed.
        _, state = whole_leaves.update(updates, state)
        return _leaves.map_measured(draw, updates, state.max_norm), state

    return transformation(whole_leaves.init, update_fn)


def _draw_leaf(leaf: Any, top: Array, coefficient: Coefficient) -> Array:
    leaf = jnp.asarray(leaf)
    wide = _leaves.wide_dtype(leaf.dtype, top.dtype)
    top = top.astype(wide)
    # The sum is sharded as the leaf is; a broadcast would not be.
    bounds = top + jnp.zeros_like(leaf, wide)
    if jnp.iscomplexobj(leaf):
        return in_two(coefficient, jnp.abs(leaf).astype(wide), bounds).scale(leaf)
    largest = np.finfo(wide).max
    reach = jnp.where(top > 0, jnp.minimum(top * _FARTHEST, largest), largest)
    reach = jnp.where(jnp.isposinf(top), top, reach)
    entries = jnp.clip(leaf.astype(wide), -reach, reach)
    return scale_updates(entries, coefficient(jnp.abs(entries), bounds)).astype(leaf.dtype)
