"""Clipping each output unit by its own norm."""

import functools

import optax

from clipax._core import _checks
from clipax._core._clip_by import clip_by
from clipax._core._transformation import injectable
from clipax._core._typing import AxisName, Bound, LeafRule
from clipax.norms import unit_norm
from clipax.thresholds import fixed


@injectable
def clip_by_unit_norm(
    max_norm: Bound,
    ord: float = 2,
    *,
    unit_axis: LeafRule = None,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales the updates of each output unit so that their norm is bounded.

    `u_j <- u_j * min(1, max_norm / norm_j)` with `norm_j = (sum_i |u_ij|^p)^(1/p)` over all
    entries that feed unit `j`.

    Args:
      max_norm: The bound, >= 0: a number, a scalar array, a schedule `count -> value`, or a tree
        prefix of them.
      ord: The order `p > 0` of the norm; `inf` is the largest modulus.
      unit_axis: The axes that count the units: an axis, a tuple of axes (`(0, -1)` for stacked
        layers), a tree prefix, or a function `(path, leaf) -> axes | None`, where None makes the
        whole leaf one unit. None is `output_last`, which is right for the kernels of Flax and
        Haiku except embeddings and attention's last projection. `clipax.units` has others.
      mask: Which leaves are clipped, as in `clip_by_leaf_norm`.
      axis_name: As in `clip_by_global_norm`, but only the axes that shard what is summed, not
        those that shard the units. Under `shard_map` with types, a state made outside shows which
        is which; a state made inside needs `axis_name`.

    Returns:
      A transformation whose state is a `ClipState` with an array per leaf that broadcasts against
      the leaf, or a scalar where the leaf is one unit.

    Raises:
      ValueError: A value in `max_norm` is not a number >= 0; `ord` <= 0; at `init` and `update`, a
        prefix does not fit or a leaf lacks an axis.

    | leaf | result |
    |---|---|
    | a unit with norm <= max_norm | that unit, bit for bit |
    | rank 0 or 1 | one unit, unless a function says otherwise |
    | a NaN entry | its unit all NaN; other units unharmed |
    | masked out, None, integer, bool, float0 | unchanged, not measured |

    Example:
      >>> clip = clip_by_unit_norm(1.0)
      >>> updates = {"kernel": jnp.array([[3.0, 0.5], [4.0, 0.0]])}
      >>> clip.update(updates, clip.init(updates))[0]["kernel"].round(6)
      Array([[0.6, 0.5],
             [0.8, 0. ]], dtype=float32)

    References:
      Brock, De, Smith, Simonyan, 2021, https://arxiv.org/abs/2102.06171 (for what a unit is)
    """
    _checks.axes(unit_axis=unit_axis)
    _checks.static(mask=mask)
    norm = functools.partial(unit_norm, ord=_checks.order(ord), unit_axis=unit_axis, mask=mask)
    return clip_by(norm, fixed(max_norm), axis_name=axis_name)
