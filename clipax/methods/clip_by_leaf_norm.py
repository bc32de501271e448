"""Clipping each leaf by its own norm."""

import functools

import optax

from clipax._core import _checks
from clipax._core._clip_by import clip_by
from clipax._core._transformation import injectable
from clipax._core._typing import AxisName, Bound, LeafRule
from clipax.norms import leaf_norm
from clipax.thresholds import fixed


@injectable
def clip_by_leaf_norm(
    max_norm: Bound,
    ord: float = 2,
    *,
    axes: LeafRule = None,
    stack_axis: LeafRule = None,
    mask: LeafRule = True,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf by its own factor so that its norm is bounded.

    `u_l <- u_l * min(1, max_norm / norm_l)` with `norm_l = (sum_i |u_li|^p)^(1/p)` over the
    entries of leaf `l`, or over chosen axes of it.

    Args:
      max_norm: The bound, >= 0: a number, a scalar array, a schedule `count -> value`, or a tree
        prefix of them, such as `{"encoder": 1.0, "head": 0.1}`.
      ord: The order `p > 0` of the norm; `inf` is the largest modulus.
      axes: The axes to sum over, as in `tf.clip_by_norm`; None sums over all. One value for every
        leaf, a tree prefix, or a function `(path, leaf) -> axes` with paths like "encoder/kernel".
      stack_axis: The axis along which layers are stacked, as by `scan`, so that each layer is
        clipped by itself. It takes the forms of `axes`, and None where nothing is stacked:
        `lambda path, leaf: 0 if path.startswith("layers") else None`.
      mask: Which leaves are clipped: True, a tree prefix of booleans, or a function
        `(path, leaf) -> bool`.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` with a scalar per leaf, or an array that
      broadcasts against the leaf where only some axes are summed.

    Raises:
      ValueError: A value in `max_norm` is not a number >= 0; `ord` <= 0; at `init` and `update`, a
        prefix does not fit, or a leaf lacks an axis or has both `axes` and `stack_axis`.

    | leaf | max_norm | result |
    |---|---|---|
    | norm <= max_norm | any | the leaf, bit for bit |
    | zero | 0 | zeros |
    | an inf entry | finite | NaN there, zero elsewhere in the leaf; other leaves unharmed |
    | a NaN entry | any | the leaf all NaN; other leaves unharmed |
    | masked out, None, integer, bool, float0 | any | unchanged, not measured |

    Example:
      >>> clip = clip_by_leaf_norm(6.0)
      >>> updates = {"w": jnp.array([3.0, 4.0]), "b": jnp.array([12.0])}
      >>> clip.update(updates, clip.init(updates))[0]
      {'b': Array([6.], dtype=float32), 'w': Array([3., 4.], dtype=float32)}

    References:
      https://www.tensorflow.org/api_docs/python/tf/clip_by_norm
    """
    _checks.axes(axes=axes, stack_axis=stack_axis)
    _checks.static(mask=mask)
    norm = functools.partial(
        leaf_norm, ord=_checks.order(ord), axes=axes, stack_axis=stack_axis, mask=mask
    )
    return clip_by(norm, fixed(max_norm), axis_name=axis_name)
