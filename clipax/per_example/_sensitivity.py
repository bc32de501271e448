"""How much one example can change a sum of clipped gradients."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _checks
from clipax._core._typing import Array
from clipax.norms import global_norm
from clipax.per_example._bounds import check_max_norm


def sensitivity(
    max_norm: Any, *, normalize_by: jax.typing.ArrayLike = 1.0, replace: bool = False
) -> float | Array:
    """Bounds how far one example can move the gradients of `clipped_grad`.

        sensitivity = sqrt(sum over parts of max_norm^2) / normalize_by

    This is the largest L2 distance, over all leaves, between the gradients of two batches of
    which one has one example (with `num_users`, the examples of one user) more. The order of
    examples does not matter. Noise with a standard deviation of `noise_multiplier * sensitivity`
    is what an accountant assumes.

    Args:
      max_norm: The bound that `clipped_grad` has: a number >= 0, or a tree of them.
      normalize_by: The constant that `clipped_grad` has; 1 for `mean=False`.
      replace: Whether neighbouring batches differ in the value of one example, which doubles the
        sensitivity, and not in its presence.

    Returns:
      A number, or a scalar array if an argument is an array.

    Raises:
      ValueError: An argument is not as above.

    | `clipped_grad` has | sensitivity |
    |---|---|
    | `mean=True` without `normalize_by` | no bound, because the divisor depends on the examples |
    | no `skip_nonfinite` | infinite: a NaN in one example makes all gradients NaN |
    | `mask` | the same: masking an example is removing it |
    | `skip_nonfinite` | the same: a skipped example moves nothing |
    | another coefficient of clipax | the same, because `coefficient * norm <= max_norm` |
    | `unclipped`, or a coefficient above `max_norm / norm` | no bound |
    | `user_ids` | the same for a user, all of whose examples must be in one batch, on one device |

    Gradients are exact to rounding, and so is this bound: about 1e-6 of it in float32.

    Example:
      >>> sensitivity({"kernel": 3.0, "bias": 4.0})
      5.0
      >>> sensitivity(1.0, normalize_by=128, replace=True)
      0.015625
    """
    check_max_norm(max_norm)
    _checks.scalar(_checks.finite_positive, normalize_by=normalize_by)
    _checks.flag(replace=replace)
    moves = 2 if replace else 1
    bounds = jax.tree.leaves(max_norm)
    if not any(isinstance(each, jax.Array) for each in (*bounds, normalize_by)):
        # Numbers stay numbers, also inside `jit`, because an accountant needs to know them.
        return moves * math.hypot(*map(float, bounds)) / float(np.asarray(normalize_by))
    bound = global_norm([jnp.asarray(each, float) for each in bounds], axis_name=())
    return moves * bound / jnp.asarray(normalize_by).astype(bound.dtype)
