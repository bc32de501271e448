"""ACClip: momentum, each entry of it against a running mean of its moduli."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from clipax._core import _checks, _leaves, _moments
from clipax._core._clip_by import ClipState, clip_by
from clipax._core._transformation import transformation
from clipax._core._typing import Array, AxisName, Updates
from clipax.coefficients import hard, scale_updates
from clipax.norms import leaf_norm


class AcclipState(NamedTuple):
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
    """Turns updates into momentum whose entries are bounded by their usual moduli.

    `momentum_i <- decay * momentum_i + (1 - decay) * u_i` and
    `max_value_i^ord <- decay_bound * max_value_i^ord + (1 - decay_bound) * |u_i|^ord`, then
    `u_i <- momentum_i * min(1, max_value_i / (|momentum_i| + eps))`. Both start at zero and
    have no bias correction, so the first steps are short: the very first is
    `(1 - decay_bound) * u_i` at `ord=1`.

    Whatever finite updates came before, half of a usual norm passes within 850 steps: within
    `log(1 - 0.5^ord) / log(decay_bound)` after tiny ones, which is 69, and after an opposite
    spike of `s` usual norms when its momentum is gone, `log(s) / -log(decay)` steps later.

    What comes out is momentum already: it goes before `optax.scale_by_learning_rate`, or
    `optax.sgd` without momentum, and not before Adam.

    Args:
      decay: The weight of the past in the momentum, in [0, 1).
      decay_bound: The weight of the past in the bound, in [0, 1).
      ord: The power whose mean is kept for the bound, > 0 and finite. The heavier the tails
        of the noise, the lower; at 2, the mean exists for a finite variance alone.
      eps: Added to the momentum's modulus, > 0 and finite. Entries whose gradients are small
        against it shrink.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation whose state is an `AcclipState`. Its `clip` is a `ClipState` of trees
      with a scalar a leaf: `norm` is the largest `(|momentum_i| + eps) / max_value_i` of an
      entry with momentum, `max_norm` is 1, `coefficient` the smallest factor that such an
      entry was scaled by. `momentum` and `max_value` are float32 (float64 for float64 leaves;
      the momentum of complex leaves is complex) in the shape of the parameters.

    Raises:
      ValueError: A number is out of its range, NaN, boolean, None or a string; at `update`,
        the updates have another structure than at `init`.

    The defaults are those of the paper.

    | entry | result |
    |---|---|
    | the first step | `(1 - decay_bound) * u_i` at `ord=1`, but for `eps` |
    | momentum + eps <= max_value_i | the momentum |
    | zero in every step so far | zero |
    | gradients far below `eps` | nearly zero |
    | NaN or inf | NaN or inf. No entry of any leaf is learned |
    | beside a NaN or inf entry | as ever |
    | None, integer, bool, float0 leaf | as it was, not measured |

    Derivatives exist where no bound equals a momentum and, for an `ord` below 2, where no entry
    is zero. There, and where a bound and its gradient are zero, they are finite.

    Differences from a port that many use: there `ord` is 2 by default, and an option divides
    by the root of a second moment too, from an earlier version of the paper. The bound is
    kept rather than its power, so that no power of it leaves the range of float32.

    Example:
      >>> clip = acclip(0.5, decay_bound=0.75, eps=1e-12)
      >>> state = clip.init(jnp.zeros(1))
      >>> for entry in (4.0, 0.0):  # momentum 2, then 1; bound 1, then 0.75
      ...     clipped, state = clip.update(jnp.array([entry]), state)
      ...     print(clipped)
      [1.]
      [0.75]

    References:
      Zhang, Karimireddy, Veit, Kim, Reddi, Kumar, Sra, "Why are adaptive methods good for
      attention models?", 2020, https://arxiv.org/abs/1912.03194
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
        # A mean that overflows is no history either.
        is_finite = _moments.all_finite(momentum, axis_name=axis_name)
        before = state.momentum, state.max_value
        learned = _leaves.choose(is_finite, (momentum, bounds), before)
        clipped = scale_updates(momentum, factors)
        return _moments.narrowed(clipped, updates), AcclipState(clip, *learned)

    return transformation(init_fn, update_fn, AcclipState)


def _relative(size: Array, bound: Array, eps: jax.typing.ArrayLike) -> Array:
    """How often the bound goes into the size and eps; 0 for a size of zero."""
    divisor = jnp.where(size > 0, bound, 1.0)
    return jnp.where(size == 0, 0.0, (size + jnp.asarray(eps).astype(size.dtype)) / divisor)
