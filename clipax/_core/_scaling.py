"""The one place where updates are scaled."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _kinds, _leaves
from clipax._core._typing import Array, Coefficient, Norms, Updates


def scale_updates(updates: Updates, coefficients: Norms) -> Updates:
    """Multiplies updates by a tree prefix of coefficients: `u <- c * u`.

    The product is computed in float32 (float64 where a factor or a leaf is) and rounded to the
    leaf's own dtype, so a factor of one is the identity, bit for bit, for every normal number. A
    complex leaf keeps its phase. Leaves that are not measured, or whose coefficient is None, pass
    through.

    Args:
      updates: Any pytree.
      coefficients: A tree prefix of `updates`, or a dict from paths such as "encoder/kernel".
        Each coefficient broadcasts against the leaves that it scales.

    Returns:
      The scaled updates, in the structure and dtypes of `updates`.

    Example:
      >>> scale_updates({"w": jnp.array([3.0, 4.0]), "n": 7}, jnp.array(0.5))
      {'n': 7, 'w': Array([1.5, 2. ], dtype=float32)}
    """
    return _leaves.map_measured(_kinds.once_per_kind(_scale_leaf), updates, coefficients)


class Factors(NamedTuple):
    """A coefficient as a product of two factors, because it can be too small for one float."""

    first: Norms
    """1, or a power of two where the coefficient is below the smallest normal float."""
    second: Norms

    @property
    def product(self) -> Norms:
        return jax.tree.map(jax.lax.mul, self.first, self.second)

    def scale(self, updates: Updates) -> Updates:
        scale = _kinds.once_per_kind(_scale_leaf)
        return _leaves.map_measured(scale, updates, self.first, self.second)


def in_two(coefficient: Coefficient, norms: Norms, max_norms: Norms) -> Factors:
    """Splits the coefficient of each norm into two factors, so that any float can be clipped."""
    split = _kinds.once_per_kind(functools.partial(_in_two, coefficient))
    return Factors(*_kinds.map_in_rows(split, norms, max_norms, width=2))


def _in_two(coefficient: Coefficient, norm: Array, max_norm: Array) -> tuple[Array, Array]:
    whole = coefficient(norm, max_norm)
    limits = np.finfo(norm.dtype)
    half = 2.0 ** -(limits.maxexp // 2)
    # This far above the bound, coefficients fall as `max_norm / norm`, so a power of two can move
    # from the norm to a factor of its own. The direction stays for any coefficient.
    is_far = (norm * half > max_norm / half**0.5) & (max_norm > 0)
    is_lost = is_far & (whole < limits.tiny)
    is_lost_by_half = norm * half > max_norm * 2.0 ** (limits.maxexp * 7 // 8)
    inverse = jnp.where(is_lost, jnp.where(is_lost_by_half, 1 / limits.tiny, 1 / half), 1)
    # A quotient, because XLA would compute anything cheaper again in the kernel of every leaf.
    first = 1 / inverse.astype(norm.dtype)
    return first, coefficient(norm * first, max_norm)


def _scale_leaf(leaf: Any, *given: Array) -> Array:
    leaf, *factors = map(jnp.asarray, (leaf, *given))
    wide = _leaves.wide_dtype(leaf.dtype, *(factor.dtype for factor in factors))

    def scale(part: Array) -> Array:
        for factor in factors:
            part = part.astype(wide) * factor.astype(wide)
        return part

    if jnp.iscomplexobj(leaf):
        # A complex product would mix inf * 0 = NaN of one part into the other.
        return jax.lax.complex(scale(leaf.real), scale(leaf.imag)).astype(leaf.dtype)
    return scale(leaf).astype(leaf.dtype)
