"""Clipping singular values only where a cheap bound does not show that all are small enough."""

from typing import Any

import jax
import jax.numpy as jnp

from clipax._core import _branches
from clipax._core._typing import Array, Coefficient
from clipax._spectral import _bounds, _spectral
from clipax._spectral._matrices import MatrixView


def clip_measured(
    view: MatrixView,
    leaf: Any,
    measured: _spectral.Measured,
    max_norm: Array,
    coefficient: Coefficient,
    iterations: int | None,
) -> Array:
    """Clips the matrices of a leaf; one within its bound stays, bit for bit."""
    clipped = _spectral.clip(view.matrices(leaf), measured, max_norm, coefficient, iterations)
    stays = view.as_norm(coefficient(measured.norm, max_norm) == 1)
    # The selection has the shape of the leaf, so the result is sharded as the leaf is.
    return jnp.where(stays, leaf, view.leaf(clipped, leaf))


def clip_where_needed(
    view: MatrixView,
    leaf: Any,
    frobenius: Array,
    max_norm: Array,
    coefficient: Coefficient,
    iterations: int | None,
) -> tuple[Array, Array]:
    """The norms of the matrices of a leaf, and the leaf clipped, decomposed only where needed.

    A norm is the largest singular value where a matrix had to be decomposed, so wherever it is
    clipped, and a bound from below otherwise.
    """
    leaf = jnp.asarray(leaf)
    lowest = view.per_matrix(_bounds.from_below(view, leaf, frobenius))
    bound = jax.lax.stop_gradient(max_norm)

    def is_within(norm: Array) -> Array:
        # A coefficient does not grow with the singular value.
        return coefficient(jax.lax.stop_gradient(norm), bound) == 1

    # The branches read the leaf itself, because a transposed one would be copied for them.
    def is_within_by_products() -> Array:
        return is_within(_bounds.from_products(view.matrices(jax.lax.stop_gradient(leaf))))

    def clip() -> tuple[Array, Array]:
        measured = _spectral.measure(view.matrices(leaf), iterations)
        clipped = clip_measured(view, leaf, measured, max_norm, coefficient, iterations)
        return jnp.where(is_small, lowest, measured.norm), clipped

    is_small = is_within(_bounds.from_frobenius(view.per_matrix(frobenius)))
    # A matrix that surely exceeds its bound needs no nearer one.
    is_open = ~is_small & is_within(lowest)
    is_small |= is_open & _branches.where_any(is_open, is_within_by_products, lambda: is_open)
    return _branches.where_any(~is_small, clip, lambda: (lowest, leaf))
