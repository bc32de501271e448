"""A cap on the bounds of another threshold."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks
from clipax._core._typing import Bound, Norms
from clipax.thresholds._fixed import bounded
from clipax.thresholds._per_norm import as_threshold
from clipax.thresholds._threshold import Threshold


def capped(threshold: Bound | optax.GradientTransformation, max_norm: Bound | None) -> Threshold:
    """Bounds norms by the smaller of a threshold's bound and a fixed one.

    Args:
      threshold: Any threshold, in the forms that `clip_by` takes.
      max_norm: The cap, > 0, in the forms that `fixed` takes. None sets no cap.

    Returns:
      A threshold whose state is the pair of both states; without a cap, `threshold` itself.

    Raises:
      ValueError: A number in `max_norm` is not > 0; at `init` and `update`, it does not fit.

    Example:
      >>> threshold = capped(relative_to_params(0.5), 3.0)
      >>> norm, param_norm = jnp.array(9.0), jnp.array(10.0)
      >>> threshold.update(norm, threshold.init(norm), param_norm)[0]
      Array(3., dtype=float32)
    """
    inner = as_threshold(threshold=threshold)
    if max_norm is None:
        return inner
    cap = bounded(_checks.positive, max_norm=max_norm)

    def init_fn(norms: Norms) -> Any:
        return inner.init(norms), cap.init(norms)

    def update_fn(norms: Norms, state: Any, params: Norms = None, **extra_args: Any) -> Any:
        bounds, inner_state = inner.update(norms, state[0], params, **extra_args)
        caps, cap_state = cap.update(norms, state[1])
        return jax.tree.map(jnp.minimum, bounds, caps), (inner_state, cap_state)

    return Threshold(init_fn, update_fn)
