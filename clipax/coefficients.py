"""The coefficient axis, and the one place where updates are scaled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax import _leaves
from clipax._typing import Array, Norms, Updates


def hard(norm: Array, max_norm: Array, *, eps: jax.typing.ArrayLike = 0.0) -> Array:
    """Computes `coefficient = min(1, max_norm / (norm + eps))`.

    It never divides by zero, nor does its derivative.

    Args:
      norm: Norms, of any shape.
      max_norm: Bounds in the same shape, >= 0.
      eps: Added to the norm; 1e-6 is torch's rule, to the last bit, under which a clipped
        norm ends just below the bound.

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
    eps = jnp.asarray(eps).astype(norm.dtype)
    norm = norm + eps
    within = (norm < max_norm) | ((norm == max_norm) & ((eps == 0) | jnp.isposinf(norm)))
    # The inner `where` keeps 0 / 0 out of the derivative.
    divisor = jnp.where(within, 1.0, norm)
    quotient = max_norm / divisor
    # With an eps, torch multiplies by the inverse, which is not the quotient to the last bit.
    # The inverse of the largest norms is subnormal, and would be flushed to zero.
    by_inverse = (eps != 0) & (divisor < np.finfo(norm.dtype).max / 8)
    product = jnp.minimum(1.0, max_norm * (1.0 / divisor))
    return jnp.where(within, 1.0, jnp.where(by_inverse, product, quotient))


def unclipped(norm: Array, max_norm: Array) -> Array:
    """Computes `coefficient = 1`: everything passes, NaN and inf too.

    Example:
      >>> unclipped(jnp.array([5.0]), jnp.array([1.0]))
      Array([1.], dtype=float32)
    """
    del max_norm
    return jnp.ones_like(norm)


def scale_updates(updates: Updates, coefficients: Norms) -> Updates:
    """Multiplies updates by a tree prefix of coefficients: `u <- c * u`.

    The product is taken in float32 (float64 where a factor or a leaf is) and returns to
    the leaf's own dtype, so a factor of one is the identity, bit for bit, for every
    normal number. A complex leaf keeps its phase. None in `coefficients` and leaves that
    are not measured pass through.

    Args:
      updates: Any pytree.
      coefficients: A tree prefix of it; each leaf broadcasts against what it scales.

    Example:
      >>> scale_updates({"w": jnp.array([3.0, 4.0]), "n": 7}, jnp.array(0.5))
      {'n': 7, 'w': Array([1.5, 2. ], dtype=float32)}
    """

    def scale_subtree(coefficient: Array | None, subtree: Updates) -> Updates:
        if coefficient is None:
            return subtree
        return jax.tree.map(lambda leaf: _scale_leaf(leaf, coefficient), subtree)

    return _leaves.map_prefix(scale_subtree, coefficients, updates, name="coefficients")


def _scale_leaf(leaf: Any, coefficient: Array) -> Any:
    if not _leaves.is_measured(leaf):
        return leaf
    leaf = jnp.asarray(leaf)
    wide = _leaves.wide_dtype(leaf.dtype, coefficient.dtype)
    factor = coefficient.astype(wide)
    if jnp.iscomplexobj(leaf):
        # A complex product would mix inf * 0 = NaN of one part into the other.
        parts = (part.astype(wide) * factor for part in (leaf.real, leaf.imag))
        return jax.lax.complex(*parts).astype(leaf.dtype)
    return (leaf.astype(wide) * factor).astype(leaf.dtype)
