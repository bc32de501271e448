"""Clipping each leaf by its root mean square."""

import optax

from clipax._core import _checks
from clipax._core._clip_by import clip_by
from clipax._core._typing import AxisName, Bound
from clipax.norms import block_rms
from clipax.thresholds._fixed import bounded


def clip_by_block_rms(
    max_rms: Bound, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf so that its root mean square is bounded.

    `u_l <- u_l * min(1, max_rms / rms_l)` with `rms_l = sqrt(mean(|u_l|^2))`. After
    `optax.scale_by_adam()` or `optax.scale_by_factored_rms()`, this is Adafactor's update
    clipping.

    Args:
      max_rms: The bound, > 0: a number, a scalar array, a schedule `count -> value`, or a tree
        prefix of them. Adafactor has 1.0.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is a `ClipState` with a scalar per leaf; its `norm` and
      `max_norm` are root mean squares.

    Raises:
      ValueError: A value in `max_rms` is not a number > 0; at `init` and `update`, the prefix does
        not fit.

    | leaf | result |
    |---|---|
    | rms <= max_rms | the leaf, bit for bit |
    | zero, or without entries | unchanged |
    | an inf entry | NaN there, zero elsewhere in the leaf; other leaves unharmed |
    | a NaN entry | the leaf all NaN; other leaves unharmed |
    | None, integer, bool, float0 | unchanged, not measured |

    Example:
      >>> clip = clip_by_block_rms(1.0)
      >>> updates = jnp.array([3.0, 4.0, 0.0, 0.0])
      >>> clip.update(updates, clip.init(updates))[0].round(6)
      Array([1.2, 1.6, 0. , 0. ], dtype=float32)

    References:
      Shazeer, Stern, "Adafactor", 2018, https://arxiv.org/abs/1804.04235
    """
    return clip_by(block_rms, bounded(_checks.positive, max_rms=max_rms), axis_name=axis_name)
