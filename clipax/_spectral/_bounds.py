"""Bounds on the largest singular value that are cheaper than a decomposition."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _leaves, _placement
from clipax._core._powers import root
from clipax._core._typing import Array
from clipax._spectral._matrices import MatrixView
from clipax._spectral._singular import adjoint, in_units, matmul

# A bound with this factor holds whatever rounding did to it.
_MARGIN = 1.001
# Entries of a smaller matrix may be flushed to zero in a product.
_LEAST_NORM = 2.0**-100
_SQUARINGS = 9
# These give a sum of 16th powers. Its root is 1.2 times the largest of 768 singular values of
# random entries; another product would make that 1.1.
_SQUARINGS_FOR_BOUND = 2


def from_frobenius(norm: Array) -> Array:
    """The bound that a Frobenius norm is; NaN where that norm is not in the usual range."""
    is_usual = jnp.isfinite(norm) & ((norm == 0) | (norm >= _LEAST_NORM))
    return jnp.where(is_usual, norm * _MARGIN, jnp.nan)


def from_products(x: Array) -> Array:
    """A bound that takes three matrix products, nearer than the Frobenius norm."""
    return schatten_norm(x, _SQUARINGS_FOR_BOUND) * _MARGIN


def from_below(view: MatrixView, leaf: Array, frobenius: Array) -> Array:
    """One power iteration: `|x^H y| / |y|` for `y = x v` and a vector `v` of random signs.

    No entry of `x v` exceeds the Frobenius norm for `|v| = 1`, so all products stay in range. The
    products are sums over axes of the leaf, because a CPU would copy a transposed leaf, and is
    slow at products with a vector.
    """
    leaf = _leaves.widened(leaf)
    unit = jnp.where(frobenius > 0, frobenius, 1).astype(leaf.dtype)
    shape = [size if axis in view.columns else 1 for axis, size in enumerate(leaf.shape)]
    # Fixed signs. A vector of ones would be orthogonal to gradients whose rows sum to zero.
    signs = np.random.default_rng(0).choice([-1.0, 1.0], shape) / math.prod(shape) ** 0.5
    scaled = jax.lax.stop_gradient(leaf) * jnp.asarray(signs, leaf.dtype)
    y = jnp.sum(scaled, view.columns, keepdims=True) / unit
    length = view.length(y)
    y = y / jnp.where(length > 0, length, 1).astype(leaf.dtype)
    return frobenius * view.length(jnp.sum(jnp.conj(leaf) * y, view.rows, keepdims=True) / unit)


def schatten_norm(x: Array, squarings: int = _SQUARINGS) -> Array:
    """`(sum_i s_i^p)^(1/p)`, which is 1 to n^(1/p) times the largest of n values.

    `p` is `2^(squarings + 2)`, by default 2048. Each square is divided by its Frobenius norm
    first, so that nothing overflows, and the product of the roots of these norms is the result.
    """
    scaled, unit, largest = in_units(x)

    def root_of(power: Array, step: Array) -> tuple[Array, Array]:
        size = _length(power)[..., None]
        # The inner `where` keeps the derivative finite at zero.
        divisor = jnp.where(size > 0, size, 1)
        exponent = 0.5 ** jnp.asarray(step + 1).astype(size.dtype)
        return divisor, jnp.where(size > 0, divisor**exponent, 0)

    def square(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        power, norm = carry
        divisor, factor = root_of(power, step)
        power = power / divisor.astype(power.dtype)[..., None]
        return matmul(power, power), norm * factor

    start = matmul(adjoint(scaled), scaled), _placement.filled_like(unit, 1.0)
    power, norm = jax.lax.fori_loop(0, squarings, square, start)
    norm = norm * root_of(power, jnp.asarray(squarings))[1]
    return jnp.where(jnp.isfinite(largest), norm * unit, largest)[..., 0]


def _length(x: Array) -> Array:
    return root(jnp.sum(_leaves.squared_modulus(x), axis=(-2, -1)), 2)
