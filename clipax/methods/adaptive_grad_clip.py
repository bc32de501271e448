"""Adaptive gradient clipping (AGC)."""

import functools

import jax
import optax

from clipax._core import _checks
from clipax._core._clip_by import clip_by
from clipax._core._typing import AxisName, Bound, LeafRule
from clipax.norms import unit_norm
from clipax.thresholds import relative_to_params
from clipax.units import nfnets


def adaptive_grad_clip(
    ratio: Bound,
    eps: jax.typing.ArrayLike = 1e-3,
    *,
    unit_axis: LeafRule = None,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Bounds the norm of each unit's updates by a share of its parameters' norm.

    `u_j <- u_j * min(1, max_norm_j / |u_j|)` with `max_norm_j = ratio * max(|p_j|, eps)` for the
    parameters `p_j` of unit `j`. Both norms are L2.

    Args:
      ratio: The norm of the updates over that of the parameters, > 0: a number, a scalar array, a
        schedule `count -> value`, or a tree prefix of them. The paper has 0.01 to 0.16, and
        smaller values for larger batches.
      eps: The least parameter norm, >= 0, so that units that start at zero can move.
      unit_axis: What a unit is, as in `clip_by_unit_norm`. None is `nfnets`, the rule of the
        paper's code and of optax. `output_first` is timm's and torch's, `output_last` fits Flax
        and Haiku in every rank, and `whole_leaf` with `ratio=0.3` is Dreamer's.
      mask: Which leaves are clipped, as in `clip_by_leaf_norm`. The paper leaves out the last
        layer: `lambda path, leaf: not path.startswith("head")`.
      axis_name: As in `clip_by_unit_norm`.

    Returns:
      A transformation whose `update` needs `params`. Its state is a `ClipState` with an array per
      leaf that broadcasts against the leaf, or a scalar where the leaf is one unit.

    Raises:
      ValueError: A value in `ratio` is not a number > 0, or `eps` not a number >= 0; at `update`,
        `params` is missing; at `init` and `update`, a prefix does not fit.

    | leaf | result |
    |---|---|
    | a unit with norm <= max_norm | that unit, bit for bit |
    | parameters of a unit all zero | bounded by `ratio * eps` |
    | None (frozen), whatever its parameter | None |
    | an inf entry | NaN there, zero elsewhere in its unit; other units unharmed |
    | a NaN entry | its unit all NaN; other units unharmed |
    | masked out, integer, bool, float0 | unchanged, not measured |

    Differences from the paper's code and optax: the norm of the updates has no floor of 1e-6,
    which shows where `ratio * eps` is as small; ranks above five have a rule; and vectors keep
    their rule when `unit_axis` gives an axis.

    Example:
      >>> clip = adaptive_grad_clip(0.5)
      >>> params = jnp.array([[0.6, 0.0], [0.8, 0.0]])
      >>> updates = jnp.array([[3.0, 0.0], [4.0, 1.0]])
      >>> clip.update(updates, clip.init(params), params)[0].round(6)
      Array([[0.3   , 0.    ],
             [0.4   , 0.0005]], dtype=float32)

    References:
      Brock, De, Smith, Simonyan, 2021, https://arxiv.org/abs/2102.06171
    """
    threshold = relative_to_params(ratio, eps)
    _checks.axes(unit_axis=unit_axis)
    _checks.static(mask=mask)
    rule = nfnets if unit_axis is None else unit_axis
    norm = functools.partial(unit_norm, unit_axis=rule, mask=mask)
    return clip_by(norm, threshold, axis_name=axis_name)
