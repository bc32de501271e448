"""Splitting a bound over the leaves of the parameters."""

import math
from typing import Any

import jax
import numpy as np

from clipax._core import _checks, _paths
from clipax._core._shown import shown


def split_max_norm(max_norm: jax.typing.ArrayLike, params: Any, *, by_size: bool = False) -> Any:
    """Splits one bound into bounds of the leaves, whose root of the sum of squares it is.

        max_norm_l = max_norm / sqrt(K), or max_norm * sqrt(size_l / size) with `by_size`

    With these bounds, `clipped_grad` clips each leaf by itself, and has the same sensitivity as
    with `max_norm` over all leaves.

    Args:
      max_norm: The bound over all leaves, >= 0.
      params: The parameters, with K leaves, or their shapes.
      by_size: Whether a leaf's share grows with its size, as in
        `optax.per_example_layer_norm_clip(uniform=False)`. All shares are equal otherwise, as in
        `uniform=True` there and in the per-layer clipping of Opacus.

    Returns:
      A tree in the structure of `params`.

    Raises:
      ValueError: `max_norm` is not a number >= 0, or `params` have no entries.

    Example:
      >>> params = {"bias": jnp.zeros(9), "kernel": jnp.zeros((4, 4))}
      >>> split_max_norm(10.0, params, by_size=True)
      {'bias': 6.0, 'kernel': 8.0}

    References:
      McMahan et al., Learning Differentially Private Recurrent Language Models, 2018,
      arXiv:1710.06963.
    """
    _checks.scalar(_checks.non_negative, max_norm=max_norm)
    _checks.flag(by_size=by_size)
    sizes = [math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(params)]
    if not sum(sizes):
        raise ValueError(f"params must have leaves with entries, got {shown(params)}.")
    shares = [size / sum(sizes) if by_size else 1 / len(sizes) for size in sizes]
    return _paths.rebuilt(params, [max_norm * math.sqrt(share) for share in shares])
