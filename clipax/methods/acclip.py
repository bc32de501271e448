"""ACClip: momentum whose entries are bounded by a running mean of their moduli."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _choice, _moments
from clipax._core._clip_by import ClipState, clip_by
from clipax._core._scaling import scale_updates
from clipax._core._transformation import transformation
from clipax._core._typing import Array, AxisName, Updates
from clipax.coefficients import hard
from clipax.norms import leaf_norm


class AcclipState(NamedTuple):
    """The memory of `acclip`."""

    clip: ClipState
    momentum: Updates
    """The running mean of the updates."""
    max_value: Updates
    """The bound on each entry's modulus: the root of the running mean of its powers."""


def acclip(
    decay: jax.typing.ArrayLike = 0.9,
    *,
    decay_bound: jax.typing.ArrayLike = 0.99,
    ord: jax.typing.ArrayLike = 1.0,
    eps: jax.typing.ArrayLike = 1e-5,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates by momentum and bounds each entry by its usual modulus.

        momentum_i    <- decay * momentum_i + (1 - decay) * u_i
        max_value_i^p <- decay_bound * max_value_i^p + (1 - decay_bound) * |u_i|^p    (p = ord)
        u_i           <- momentum_i * min(1, max_value_i / (|momentum_i| + eps))

    Both averages start at zero without bias correction. The result is momentum already, so put it
    before `optax.scale_by_learning_rate`, not before Adam. After any finite updates, half of a
    usual norm passes within 850 steps.

    Args:
      decay: The weight of the past in the momentum, in [0, 1). The defaults are the paper's.
      decay_bound: The weight of the past in the bound, in [0, 1).
      ord: The power averaged for the bound, > 0 and finite; lower for noise with heavier tails.
      eps: Added to the modulus of the momentum, > 0 and finite, in the unit of the updates.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation with an `AcclipState`. `momentum` and `max_value` have the shapes of the
      parameters, in float32 (float64 for float64 leaves, complex momentum for complex leaves).
      `clip` is a `ClipState` with a scalar per leaf: `norm` is the largest
      `(|momentum_i| + eps) / max_value_i` of an entry with momentum, `max_norm` is 1,
      `coefficient` the smallest factor.

    Raises:
      ValueError: An argument is out of its range or not a number; at `update`, the updates have
        another structure than at `init`.

    | entry | result |
    |---|---|
    | the first step | `(1 - decay_bound) * u_i` at `ord=1`, up to `eps` |
    | momentum + eps <= max_value_i | the momentum |
    | zero in every step so far | zero |
    | gradients far below `eps` | nearly zero |
    | NaN or inf | NaN or inf; no entry of any leaf is learned |
    | beside a NaN or inf entry | clipped as usual |
    | None, integer, bool, float0 leaf | unchanged, not measured |

    Derivatives exist where no bound equals a momentum and, for an `ord` below 2, where no entry is
    zero. There, and where a bound and its gradient are zero, they are finite.

    Example:
      >>> clip = acclip(0.5, decay_bound=0.75, eps=1e-12)
      >>> state = clip.init(jnp.zeros(1))
      >>> for entry in (4.0, 0.0):  # momentum 2, then 1; bound 1, then 0.75
      ...     clipped, state = clip.update(jnp.array([entry]), state)
      ...     print(clipped)
      [1.]
      [0.75]

    References:
      Zhang et al., 2020, https://arxiv.org/abs/1912.03194
    """
    _checks.scalar(_checks.decay_rate, decay=decay, decay_bound=decay_bound)
    _checks.scalar(_checks.finite_positive, ord=ord, eps=eps)
    record = clip_by(functools.partial(leaf_norm, ord=math.inf), 1.0, axis_name=axis_name)

    def init_fn(params: Updates) -> AcclipState:
        bounds = _moments.zero_moduli(params)
        return AcclipState(record.init(bounds), _moments.zeros(params), bounds)

    def update_fn(
        updates: Updates, state: AcclipState, params: Updates | None = None, **extra_args: Any
    ) -> tuple[Updates, AcclipState]:
        del params, extra_args
        wide = _moments.widened(updates, state.momentum)

        def average(old: Array, x: Array) -> Array:
            return _moments.mean(old, x, 1 - decay)

        def bound(old: Array, x: Array) -> Array:
            return _moments.power_mean(old, x, 1 - decay_bound, ord)

        momentum = jax.tree.map(average, state.momentum, wide)
        bounds = jax.tree.map(bound, state.max_value, wide)
        sizes = jax.tree.map(jnp.abs, momentum)
        factors = jax.tree.map(functools.partial(hard, eps=eps), sizes, bounds)
        relative = jax.tree.map(functools.partial(_relative, eps=eps), sizes, bounds)
        _, clip = record.update(relative, state.clip)
        # Finite updates can have a mean that overflows, which must not be learned either.
        is_finite = _moments.all_finite(momentum, axis_name=axis_name)
        before = state.momentum, state.max_value
        learned = _choice.choose(is_finite, (momentum, bounds), before)
        clipped = scale_updates(momentum, factors)
        return _moments.narrowed(clipped, updates), AcclipState(clip, *learned)

    return transformation(init_fn, update_fn, AcclipState)


def _relative(size: Array, bound: Array, eps: jax.typing.ArrayLike) -> Array:
    """`(size + eps) / bound`, or 0 for a size of zero."""
    divisor = jnp.where(size > 0, bound, 1.0)
    return jnp.where(size == 0, 0.0, (size + jnp.asarray(eps).astype(size.dtype)) / divisor)
