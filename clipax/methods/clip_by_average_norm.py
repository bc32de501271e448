"""Clipping each leaf by its L2 norm divided by its number of entries."""

import optax

from clipax._core._clip_by import clip_by
from clipax._core._typing import AxisName, Bound
from clipax.norms import average_norm
from clipax.thresholds import fixed


def clip_by_average_norm(
    max_norm: Bound, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf so that its average norm is bounded.

    `u_l <- u_l * min(1, max_norm / norm_l)` with `norm_l = |u_l|_2 / n_l` for the `n_l` entries of
    leaf `l`. The root mean square of `clip_by_block_rms` divides by `sqrt(n_l)` instead.

    Args:
      max_norm: The bound, >= 0: a number, a scalar array, a schedule `count -> value`, or a tree
        prefix of them.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` with a scalar per leaf.

    Raises:
      ValueError: A value in `max_norm` is not a number >= 0; at `init` and `update`, the prefix
        does not fit.

    | leaf | max_norm | result |
    |---|---|---|
    | norm <= max_norm | any | the leaf, bit for bit |
    | zero, or without entries | 0 | unchanged |
    | an inf entry | finite | NaN there, zero elsewhere in the leaf; other leaves unharmed |
    | a NaN entry | any | the leaf all NaN; other leaves unharmed |
    | None, integer, bool, float0 | any | unchanged, not measured |

    Example:
      >>> clip = clip_by_average_norm(0.5)
      >>> updates = jnp.array([3.0, 4.0])
      >>> clip.update(updates, clip.init(updates))[0].round(6)
      Array([0.6, 0.8], dtype=float32)

    References:
      https://www.tensorflow.org/api_docs/python/tf/compat/v1/clip_by_average_norm
    """
    return clip_by(average_norm, fixed(max_norm), axis_name=axis_name)
