"""The coefficient axis: factors that scale updates to their bounds."""

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _checks, _leaves
from clipax._core._scaling import scale_updates as scale_updates
from clipax._core._typing import Array, Coefficient


def hard(norm: Array, max_norm: Array, *, eps: jax.typing.ArrayLike = 0.0) -> Array:
    """Computes `coefficient = min(1, max_norm / (norm + eps))`.

    Neither the coefficient nor its derivative divides by zero.

    Args:
      norm: Norms, of any shape.
      max_norm: Bounds in the same shape, >= 0.
      eps: Added to the norm, >= 0. With 1e-6 this is torch's rule to the last bit, under which a
        clipped norm ends just below the bound.

    Returns:
      Factors in [0, 1] in the shape of `norm`.

    | norm | max_norm | coefficient |
    |---|---|---|
    | 0 | 0 | 1 |
    | > 0 | 0 | 0 |
    | inf | finite | 0 |
    | inf | inf | 1 |
    | NaN | any | NaN |

    Example:
      >>> hard(jnp.array([5.0, 0.5]), jnp.array([1.0, 1.0]))
      Array([0.2, 1. ], dtype=float32)
    """
    if isinstance(eps, int | float) and eps == 0:
        within = norm <= max_norm
        # The selections keep 0 / 0 out of the quotient and its derivative.
        return jnp.where(within, 1, max_norm) / jnp.where(within, 1, norm)
    eps = jnp.asarray(eps).astype(norm.dtype)
    norm = norm + eps
    within = (norm < max_norm) | ((norm == max_norm) & ((eps == 0) | jnp.isposinf(norm)))
    # The inner `where` keeps 0 / 0 out of the derivative.
    divisor = jnp.where(within, 1.0, norm)
    quotient = max_norm / divisor
    # With an eps, torch multiplies by the inverse, which differs from the quotient in the last
    # bit. The largest norms take the quotient: their inverse is subnormal and flushed to zero.
    by_inverse = (eps != 0) & (divisor < np.finfo(norm.dtype).max / 8)
    product = jnp.minimum(1.0, max_norm * (1.0 / divisor))
    return jnp.where(within, 1.0, jnp.where(by_inverse, product, quotient))


def unclipped(norm: Array, max_norm: Array) -> Array:
    """Computes `coefficient = 1`, so that everything passes, NaN and inf included.

    Example:
      >>> unclipped(jnp.array([5.0]), jnp.array([1.0]))
      Array([1.], dtype=float32)
    """
    del max_norm
    return jnp.ones_like(norm)


def rational(norm: Array, max_norm: Array) -> Array:
    """Computes `coefficient = 1 / (1 + norm / max_norm)`, a smooth bound.

    It shortens small updates more than the other smooth coefficients do.

    Args:
      norm: Norms, of any shape.
      max_norm: Bounds in the same shape, >= 0, which scaled norms approach from below.

    Returns:
      Factors in [0, 1] in the shape of `norm`, with finite derivatives.

    | norm | max_norm | coefficient |
    |---|---|---|
    | 0 | any, 0 too | 1 |
    | below the precision of max_norm | > 0 | 1 |
    | > 0 | 0 | 0 |
    | inf | finite | 0 |
    | any, inf too | inf | 1 |
    | NaN | any | NaN |

    Example:
      >>> rational(jnp.array([0.0, 1.0, 3.0]), jnp.ones(3))
      Array([1.  , 0.5 , 0.25], dtype=float32)
    """
    quotient, numerator = _smaller_over_larger(norm, max_norm)
    return numerator / (1 + quotient)


def square_root(norm: Array, max_norm: Array) -> Array:
    """Computes `coefficient = 1 / sqrt(1 + (norm / max_norm)^2)`, a smooth bound.

    Args:
      norm: Norms, of any shape.
      max_norm: Bounds in the same shape, >= 0, which scaled norms approach from below.

    Returns:
      Factors in [0, 1] with the edge cases of `rational`.

    Example:
      >>> square_root(jnp.array([0.0, 0.75]), jnp.ones(2))
      Array([1. , 0.8], dtype=float32)
    """
    quotient, numerator = _smaller_over_larger(norm, max_norm)
    return numerator / jnp.sqrt(1 + jnp.square(quotient))


def tanh(norm: Array, max_norm: Array) -> Array:
    """Computes a smooth bound from the hyperbolic tangent.

    `coefficient = tanh(x) / x` for `x = norm / max_norm`. It is the smooth coefficient nearest
    to `hard`.

    Args:
      norm: Norms, of any shape.
      max_norm: Bounds in the same shape, >= 0, which scaled norms approach from below.

    Returns:
      Factors in [0, 1] with the edge cases of `rational`.

    Example:
      >>> tanh(jnp.array([0.0, 20.0]), jnp.ones(2))
      Array([1.  , 0.05], dtype=float32)
    """
    quotient, _ = _smaller_over_larger(norm, max_norm)
    is_small = norm <= max_norm
    is_near_zero = is_small & (quotient <= 0.01)
    # Beyond 50, tanh is one. The floor keeps the inverse finite.
    inverse = 1 / jnp.maximum(quotient, 0.02)
    x = jnp.where(is_near_zero, 1.0, jnp.where(is_small, quotient, inverse))
    # Near zero a series, because the derivative of the quotient cancels there and divides by a
    # square that underflows.
    square = jnp.square(jnp.where(is_near_zero, quotient, 0.0))
    series = 1 - square / 3 * (1 - square * 2 / 5 * (1 - square * 17 / 42))
    above = jnp.tanh(x) * jnp.where(is_small, 1.0, quotient)
    # One quotient at the end, because a compiler may store each quotient that is used twice.
    return jnp.where(is_near_zero, series, above) / jnp.where(is_small, x, 1.0)


def normalized(norm: Array, max_norm: Array) -> Array:
    """Computes `coefficient = max_norm / norm`, which lengthens short updates too.

    It sets the norm to `max_norm` instead of bounding it: `clip_by(global_norm, 1.0, normalized)`
    is normalized descent, whose steps all have the same length.

    Args:
      norm: Norms, of any shape.
      max_norm: The norms after scaling, in the same shape, >= 0.

    Returns:
      Factors >= 0 in the shape of `norm`, above one for norms below `max_norm` and at most the
      largest number of their dtype.

    | norm | max_norm | coefficient |
    |---|---|---|
    | 0 | any | 1: zero stays zero |
    | > 0 | 0 | 0 |
    | inf | finite | 0 |
    | any, inf too | inf | 1: no finite norm can be set |
    | NaN | any | NaN |

    Example:
      >>> normalized(jnp.array([5.0, 0.5]), jnp.array([1.0, 1.0]))
      Array([0.2, 2. ], dtype=float32)
    """
    is_kept = (norm == 0) | (jnp.isposinf(max_norm) & ~jnp.isnan(norm))
    # The inner `where`s keep the quotient out of the derivative where it is not used.
    quotient = jnp.where(is_kept, 1.0, max_norm) / jnp.where(is_kept, 1.0, norm)
    return jnp.minimum(quotient, np.finfo(norm.dtype).max)


def auto_s(eps: jax.typing.ArrayLike = 0.01) -> Coefficient:
    """Makes the coefficient `max_norm / (norm + eps)` of AUTO-S.

    It is meant for the gradients of single examples (`clipped_grad`): all of them get a norm of
    about `max_norm`, except those that are not much longer than `eps`. `eps=0` gives `normalized`.

    Args:
      eps: Added to the norm, >= 0, in the unit of the norms. The paper has 0.01.

    Returns:
      A coefficient with the edge cases of `normalized`; it may exceed one.

    Raises:
      ValueError: `eps` is not a number >= 0.

    Example:
      >>> auto_s(eps=1.0)(jnp.array([4.0, 0.0]), jnp.ones(2))
      Array([0.2, 1. ], dtype=float32)

    References:
      Bu, Wang, Zha, Karypis, "Automatic clipping: differentially private deep learning made
      easier and stronger", 2022, https://arxiv.org/abs/2206.07136
    """
    _checks.scalar(_checks.non_negative, eps=eps)

    def coefficient(norm: Array, max_norm: Array) -> Array:
        (added,) = _leaves.in_dtype_of(norm, eps)
        return normalized(norm + added, max_norm)

    return coefficient


def psac(eps: jax.typing.ArrayLike = 0.1) -> Coefficient:
    """Makes the coefficient `max_norm / (norm + eps / (norm + eps))` of DP-PSAC.

    Unlike that of `auto_s`, this factor stays bounded as the norm goes to zero. It is `max_norm`
    at zero, rises to `max_norm / (2 * sqrt(eps) - eps)` at a norm of `sqrt(eps) - eps`, and falls
    from there. Small gradients are lengthened too: with an `eps` of 0.1 and a bound of 1, a norm
    of 0.2 becomes 0.375.

    Args:
      eps: The strength of the correction in the divisor, > 0; 0.1 and 0.01 are usual.

    Returns:
      A coefficient with the edge cases of `normalized`; it may exceed one.

    Raises:
      ValueError: `eps` is not a number > 0.

    Example:
      >>> psac(eps=1.0)(jnp.array([1.0, 0.0]), jnp.ones(2))
      Array([0.6666667, 1.       ], dtype=float32)

    References:
      Xia et al., "Differentially private learning with per-sample adaptive clipping", 2022,
      https://arxiv.org/abs/2212.00328 (the formula is that of public implementations)
    """
    _checks.scalar(_checks.positive, eps=eps)

    def coefficient(norm: Array, max_norm: Array) -> Array:
        (added,) = _leaves.in_dtype_of(norm, eps)
        return normalized(norm + added / (norm + added), max_norm)

    return coefficient


def _smaller_over_larger(norm: Array, max_norm: Array) -> tuple[Array, Array]:
    """Returns `x = norm / max_norm` or its inverse, whichever is in [0, 1], and 1 or that inverse.

    A coefficient `f(x)` that falls as `1 / x` is the second result times a function of the first,
    and nothing in it overflows.
    """
    within = norm <= max_norm
    smaller, larger = jnp.where(within, norm, max_norm), jnp.where(within, max_norm, norm)
    # 0 / 0 and inf / inf count as zero.
    is_zero = (larger == 0) | jnp.isposinf(larger)
    # Under a bound of zero the quotient is zero for every norm, so its derivative with respect to
    # the norm is zero. Without `stop_gradient`, the square of a small norm would make it NaN.
    divisor = jnp.where(smaller == 0, jax.lax.stop_gradient(larger), larger)
    quotient = jnp.where(is_zero, 0.0, smaller) / jnp.where(is_zero, 1.0, divisor)
    return quotient, jnp.where(within, 1.0, quotient)
