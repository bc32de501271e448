"""StableAdamW's step: Adam's step, shortened where its second moment is out of date."""

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
from clipax.norms import _mean_modulus


class StableAdamState(NamedTuple):
    """The memory of `scale_by_stable_adam`."""

    clip: ClipState
    mu: Updates
    """The mean of the updates, bias-corrected."""
    nu: Updates
    """The mean of their squares, bias-corrected."""
    step_count: Array
    """The number of steps in both means; int32."""


def scale_by_stable_adam(
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-6,
    *,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Takes Adam's step, shortened per leaf where its second moment is out of date.

        mu <- (1 - w1) * mu + w1 * u        nu <- (1 - w2) * nu + w2 * |u|^2
        rms_l = sqrt(mean(|u|^2 / max(nu, eps^2)))
        u_l <- mu / (sqrt(nu) + eps) * min(1, 1 / rms_l)

    with `w = (1 - b) / (1 - b^count)`, which is Adam's bias correction, for each leaf `l`. It
    replaces `optax.scale_by_adam` in a chain. After any finite updates, half of a usual norm
    passes within 17,500 steps, because the second moment remembers a spike, as in Adam.

    Args:
      b1: The weight of the past in the mean, in [0, 1). The defaults are those of optimi.
      b2: The weight of the past in the mean of squares, in [0, 1).
      eps: Added to the root of the mean of squares, > 0 and finite, in the unit of the updates.
      axis_name: As in `clip_by_global_norm`.

    Returns:
      A transformation with a `StableAdamState`. `mu` and `nu` have the shapes of the
      parameters, in float32 (float64 for float64 leaves, complex `mu` for complex leaves). `clip`
      is a `ClipState` with a scalar per leaf: `norm` is `rms_l`, `max_norm` is 1, `coefficient` is
      `min(1, 1 / rms_l)`.

    Raises:
      ValueError: An argument is out of its range or not a number; at `update`, the updates have
        another structure than at `init`.

    | leaf | result |
    |---|---|
    | the first step, far above eps | entries of modulus 1 |
    | rms_l <= 1 | Adam's step |
    | zero in every step so far | zeros |
    | gradients far below eps | nearly zero |
    | an entry below 1e-19, whose square is no float32 | counts as zero in `nu` |
    | an entry above 9e18, whose square is no float32 | counts as 9e18 |
    | a NaN or inf entry | all NaN; no leaf is learned, no step counted |
    | beside a leaf with such an entry | scaled as usual |
    | None, integer, bool, float0 | unchanged, not measured |

    Derivatives exist where no `rms_l` is 1 and no entry has been zero in every step. There they
    are finite.

    Differences from the paper: the factor does not shorten the decay of the weights when
    `optax.add_decayed_weights` follows.

    Example:
      >>> adam = scale_by_stable_adam(0.5, 0.75, eps=1e-12)
      >>> state = adam.init(jnp.zeros(2))
      >>> for entry in (2.0, 5.0):
      ...     step, state = adam.update(jnp.array([entry, entry]), state)
      >>> # mu = (2 + 2 * 5) / 3 = 4, nu = (3 * 2^2 + 4 * 5^2) / 7 = 16, rms = 5 / 4
      >>> state.clip.norm.round(6), step.round(6)
      (Array(1.25, dtype=float32), Array([0.8, 0.8], dtype=float32))

    References:
      Wortsman et al., 2023, https://arxiv.org/abs/2304.13013
    """
    _checks.scalar(_checks.decay_rate, b1=b1, b2=b2)
    _checks.scalar(_checks.finite_positive, eps=eps)
    record = clip_by(_moments.given_norm, 1.0, axis_name=axis_name)

    def init_fn(params: Updates) -> StableAdamState:
        nu = _moments.zero_moduli(params)
        zero = _moments.zero_norm(nu, axis_name=axis_name)
        return StableAdamState(record.init(nu), _moments.zeros(params), nu, zero.astype(jnp.int32))

    def update_fn(
        updates: Updates,
        state: StableAdamState,
        params: Updates | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, StableAdamState]:
        del params, extra_args
        count = optax.safe_increment(state.step_count)
        wide = _moments.widened(updates, state.mu)
        new, new_square = _moments.debiased(b1, count), _moments.debiased(b2, count)

        def like(x: Array) -> Array:
            return jnp.asarray(eps).astype(x.dtype)

        def relative(x: Array, nu: Array) -> Array:
            """`|x|^2 / max(nu, eps^2)` with the new `nu`."""
            square = _moments.power(_in_range(x))
            least = jnp.maximum(like(nu) ** 2, np.finfo(nu.dtype).tiny)
            weight = new_square.astype(nu.dtype)
            nu = (1 - weight) * nu + weight * square
            return square / jnp.maximum(nu, least) + _moments.zero_or_nan(x)

        def average(mu: Array, x: Array) -> Array:
            return _moments.mean(mu, _in_range(x), new)

        def average_square(nu: Array, x: Array) -> Array:
            return _moments.mean(nu, _moments.power(_in_range(x)), new_square)

        def step(mu: Array, nu: Array) -> Array:
            return _moments.divided(mu, _moments.root(nu) + like(nu))

        def learn(memory: Any) -> Any:
            mu, nu = memory
            return (
                _kinds.map_alike(average, mu, wide),
                _kinds.map_alike(average_square, nu, wide),
            )

        # These reads are only for the sum, so that XLA keeps nothing of them for later use.
        read = jax.tree.map(_compat.optimization_barrier, (wide, state.nu))
        squares = _kinds.map_alike(relative, *read)
        means = _mean_modulus(squares, axis_name=axis_name)
        rms = _kinds.map_alike(_moments.root, means)
        _, clip = record.update(rms, state.clip, norm=rms)
        is_finite = _moments.none_is_nan(rms, axis_name=axis_name)
        (mu, nu), kept = _select.learned_if(is_finite, learn, (state.mu, state.nu))
        clipped = scale_updates(_kinds.map_alike(step, mu, nu), clip.coefficient)
        count = jnp.where(is_finite, count, state.step_count)
        new_state = StableAdamState(clip, kept[0], kept[1], count)
        return _moments.narrowed(clipped, updates), new_state

    return transformation(init_fn, update_fn, StableAdamState)


def _in_range(x: Array) -> Array:
    """The entries, or the largest ones whose squares are finite in place of larger ones."""
    if jnp.iscomplexobj(x):
        return jax.lax.complex(_in_range(x.real), _in_range(x.imag))
    most = _moments.largest_to_square(x.dtype)
    return jnp.clip(x, -most, most)
