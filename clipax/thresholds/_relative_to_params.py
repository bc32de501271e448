"""Bounds that are a share of the norm of the parameters."""

from typing import Any

import jax
import jax.numpy as jnp

from clipax._core import _checks, _kinds
from clipax._core._typing import Bound, Norms
from clipax.thresholds._fixed import bounded
from clipax.thresholds._threshold import Threshold


def relative_to_params(ratio: Bound, eps: jax.typing.ArrayLike = 1e-3) -> Threshold:
    """Bounds norms by a share of the norms of the parameters.

    `max_norm = ratio * max(param_norm, eps)`.

    Args:
      ratio: The share, > 0, in the forms that `fixed` takes.
      eps: The least parameter norm, >= 0, so that a layer that starts at zero can move.

    Returns:
      A threshold with the state of `fixed(ratio)`.

    Raises:
      ValueError: `ratio` is not > 0 or `eps` not >= 0; at `update`, `params` is missing.

    Example:
      >>> threshold = relative_to_params(0.1)
      >>> threshold.update(jnp.array(5.0), threshold.init(jnp.array(5.0)), jnp.array(2.0))[0]
      Array(0.2, dtype=float32)
    """
    ratios = bounded(_checks.positive, ratio=ratio)
    _checks.scalar(_checks.non_negative, eps=eps)

    def update_fn(norms: Norms, state: Any, params: Norms = None, **extra_args: Any) -> Any:
        del extra_args
        if params is None:
            raise ValueError(
                "update needs params with the structure of the updates, because the bound is"
                " relative to their norms: call update(updates, state, params)."
            )
        ratio_tree, state = ratios.update(norms, state)
        bound = _kinds.once_per_kind(
            lambda share, norm: share * jnp.maximum(norm, jnp.asarray(eps).astype(norm.dtype))
        )
        return jax.tree.map(bound, ratio_tree, params), state

    return Threshold(ratios.init, update_fn)
