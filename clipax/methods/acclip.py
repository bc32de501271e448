"""ACClip: momentum whose entries are bounded by a running mean of their moduli."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from clipax._core import _checks, _compat, _kinds, _moments, _select
from clipax._core._clip_by import ClipState, clip_by
from clipax._core._scaling import scale_updates
from clipax._core._transformation import transformation
from clipax._core._typing import Array, AxisName, Updates
from clipax.norms import leaf_norm


class AcclipState(NamedTuple):
    """The memory of `acclip`."""

    clip: ClipState
    momentum: Updates
    """The running mean of the updates."""
    mean_power: Updates
    """The running mean of each entry's modulus to the power `ord`."""


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
      A transformation with an `AcclipState`. `momentum` and `mean_power` have the shapes of the
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
    | `|u_i|^ord` below 1e-38 | counts as zero in the bound |
    | `|u_i|^ord` above 3e38 | counts as 3e38 in the bound |
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
    record = clip_by(_moments.given_norm, 1.0, axis_name=axis_name)

    def init_fn(params: Updates) -> AcclipState:
        powers = _moments.zero_moduli(params)
        return AcclipState(record.init(powers), _moments.zeros(params), powers)

    def update_fn(
        updates: Updates, state: AcclipState, params: Updates | None = None, **extra_args: Any
    ) -> tuple[Updates, AcclipState]:
        del params, extra_args
        wide = _moments.widened(updates, state.momentum)

        def average(old: Array, x: Array) -> Array:
            return _moments.mean(old, x, 1 - decay)

        def average_power(old: Array, x: Array) -> Array:
            return _moments.mean(old, _moments.power(x, ord), 1 - decay_bound)

        def learn(memory: Any, x: Any = wide) -> Any:
            momentum, powers = memory
            return (
                _kinds.map_alike(average, momentum, x),
                _kinds.map_alike(average_power, powers, x),
            )

        def size_of(momentum: Array) -> Array:
            return jnp.abs(momentum) + jnp.asarray(eps).astype(jnp.abs(momentum).dtype)

        def relative(momentum: Array, power: Array) -> Array:
            """`(|momentum| + eps) / bound`, or 0 for a momentum of zero."""
            divisor = jnp.where(momentum == 0, 1, _moments.power_root(power, ord))
            quotient = jnp.where(momentum == 0, 0, size_of(momentum) / divisor)
            # A bound of zero, as of a power below the range, must not be an infinite record.
            most = np.finfo(quotient.dtype).max
            return jnp.minimum(quotient, most) + _moments.zero_or_nan(momentum)

        def clip_leaf(momentum: Array, power: Array) -> Array:
            bound = _moments.power_root(power, ord)
            return scale_updates(momentum, bound / jnp.maximum(size_of(momentum), bound))

        before = state.momentum, state.mean_power
        # These reads are only for the norm, so that XLA keeps nothing of them for later use.
        read_before, read = jax.tree.map(_compat.optimization_barrier, (before, wide))
        sizes = leaf_norm(
            _kinds.map_alike(relative, *learn(read_before, read)), math.inf, axis_name=axis_name
        )
        _, clip = record.update(sizes, state.clip, norm=sizes)
        # A mean of finite updates that overflows must not be learned either.
        is_finite = _moments.none_is_nan(sizes, axis_name=axis_name)
        learned, kept = _select.learned_if(is_finite, learn, before)
        clipped = _kinds.map_alike(clip_leaf, *learned)
        return _moments.narrowed(clipped, updates), AcclipState(clip, *kept)

    return transformation(init_fn, update_fn, AcclipState)
