"""Moving a bound towards a quantile of the norms of examples."""

from typing import Any

import jax
import jax.numpy as jnp

from clipax._core import _checks, _leaves, _paths
from clipax._core._shown import shown
from clipax._core._typing import Array, Norms
from clipax.per_example._bounds import check_max_norm
from clipax.per_example._info import PerExampleInfo, share_of_counted


def track_quantile(
    max_norm: Norms,
    info: PerExampleInfo,
    *,
    quantile: jax.typing.ArrayLike = 0.5,
    learning_rate: jax.typing.ArrayLike = 0.2,
) -> Norms:
    """Moves a bound towards a quantile of the examples' norms.

        max_norm <- max_norm * exp(-learning_rate * (share of norms <= max_norm - quantile))

    Args:
      max_norm: The bound that `clipped_grad` had, >= 0; 0.1 is a usual start.
      info: What `clipped_grad` returned.
      quantile: The share of examples that should not be clipped, in (0, 1).
      learning_rate: The speed, > 0. With 0.2 and a quantile of 0.5, a bound moves by at most
        10 % a step.

    Returns:
      The bound for the next batch, which has not moved if no example was counted.

    Raises:
      ValueError: An argument is not as above.

    Differences from the paper: no noise is added to the share.

    Example:
      >>> def loss_fn(w, example):
      ...     return jnp.sum(w * example)
      >>> batch = jnp.array([[3.0, 4.0], [0.0, 0.5]])
      >>> bound = jnp.array(1.0)
      >>> grads, info = clipped_grad(loss_fn, 1.0)(jnp.zeros(2), batch, max_norm=bound)
      >>> track_quantile(bound, info, quantile=0.5)  # half of the norms are at or under it
      Array(1., dtype=float32)

    References:
      Andrew et al., Differentially Private Learning with Adaptive Clipping, 2021,
      arXiv:1905.03871.
    """
    check_max_norm(max_norm)
    if not isinstance(info, PerExampleInfo):
        raise ValueError(f"info must be the PerExampleInfo of clipped_grad, got {shown(info)}.")
    _checks.scalar(_checks.inside_unit_interval, quantile=quantile)
    _checks.scalar(_checks.positive, learning_rate=learning_rate)

    values, structure = jax.tree.flatten(max_norm)
    norms = jax.tree.leaves(info.norms)
    covered = _paths.covered(max_norm, info.norms, name="max_norm")
    if len(norms) != len(values):
        raise ValueError(
            "max_norm must be in the structure of info.norms, got"
            f" {structure} for {jax.tree.structure(info.norms)}."
        )

    def move(bound: Any, sizes: Array) -> Array:
        wide = jnp.asarray(bound).astype(sizes.dtype)
        share, rate, wanted = _leaves.in_dtype_of(
            sizes, share_of_counted(info.is_counted, sizes <= wide), learning_rate, quantile
        )
        moved = wide * jnp.exp(-rate * (share - wanted))
        return jnp.where(jnp.any(info.is_counted), moved, wide).astype(jnp.asarray(bound).dtype)

    rows = zip(values, covered, strict=True)
    return jax.tree.unflatten(structure, [move(value, norms[place]) for value, (place,) in rows])
