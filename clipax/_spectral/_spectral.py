"""Functions of singular values, by a decomposition or by matrix products alone.

A matrix is the last two axes of an array and has at least as many rows as columns. It is first
divided by its largest entry, so that no square leaves the range of its dtype.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipax._core import _placement
from clipax._core._typing import Array, Coefficient
from clipax._spectral._bounds import schatten_norm
from clipax._spectral._singular import (
    Decomposition,
    adjoint,
    attached,
    decompose,
    derivative,
    in_units,
    largest,
    lasting,
    matmul,
    product,
)
from clipax.coefficients import hard

_STEPS_OF_INVERSE_ROOT = 6
# A smaller value scales more, and then the iteration would send singular values that rounding
# leaves above one below zero.
_LEAST_FOR_SCALE = 0.03


class Measured(NamedTuple):
    """The largest singular values of matrices and, without iterations, their decompositions."""

    norm: Array
    """The largest singular value, or a bound on it; not finite where the matrix is not."""
    parts: Any
    """A `Decomposition`, which is a constant under differentiation, or None."""


# Jitted so that eager calls are cached, and inlined under an outer jit. The coefficient is not an
# argument, because in eager calls every new function would be compiled and kept.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def measure(x: Array, iterations: int | None) -> Measured:
    """Decomposes matrices, or only measures them by matrix products if iterations are given."""
    if iterations is None:
        parts = decompose(jax.lax.stop_gradient(x))
        return Measured(largest(x, parts), parts)
    return Measured(schatten_norm(x), None)


def clip(
    x: Array,
    measured: Measured,
    max_norm: Array,
    coefficient: Coefficient,
    iterations: int | None,
) -> Array:
    """Clips the singular values of matrices; those within the bound may come out rounded."""
    norm = jax.lax.stop_gradient(measured.norm)
    is_kept = coefficient(norm, max_norm) == 1
    # Where nothing is clipped, the norm takes the place of the bound, which may be inf and would
    # turn products in the derivative into NaN.
    bound = jnp.where(is_kept, norm, max_norm)
    clipped = _clip(coefficient, iterations, x, measured.parts, bound)
    return jnp.where(jnp.isfinite(norm)[..., None, None], clipped, jnp.nan)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _clip(
    coefficient: Coefficient,
    iterations: int | None,
    x: Array,
    parts: Decomposition | None,
    max_norm: Array,
) -> Array:
    """`u @ diag(f(s)) @ vh` with `f(s) = s * coefficient(s, max_norm)`."""
    if parts is None:
        assert iterations is not None
        return _by_products(x, max_norm, is_hard=coefficient is hard, iterations=iterations)
    bound = jnp.broadcast_to(max_norm[..., None], parts.s.shape)
    return product(parts, parts.s * coefficient(parts.s, bound))


@_clip.defjvp
def _clip_jvp(
    coefficient: Coefficient,
    iterations: int | None,
    primals: tuple[Array, Decomposition | None, Array],
    tangents: tuple[Array, Any, Array],
) -> tuple[Array, Array]:
    """Differentiates the function of singular values itself, however it was computed.

    JAX's rule for the decomposition would divide by differences of singular values. The derivative
    of unconverged iterations is far from that of their limit.
    """
    x, parts, max_norm = primals
    given = decompose(jax.lax.stop_gradient(x)) if parts is None else parts
    by_both = functools.partial(derivative, coefficient)
    moved = by_both(*attached(x, given), max_norm, (tangents[0], tangents[2]))

    def by_given(x_dot: Array, max_norm_dot: Array) -> Array:
        return by_both(given, None, jax.lax.stop_gradient(max_norm), (x_dot, max_norm_dot))

    clipped = _clip(coefficient, iterations, x, parts, max_norm)
    return lasting(clipped, by_given, x, max_norm), moved


@functools.partial(jax.jit, static_argnames=("is_hard", "iterations"), inline=True)
def _by_products(x: Array, max_norm: Array, *, is_hard: bool, iterations: int) -> Array:
    """Clips singular values by Newton-Schulz iterations, with `hard` or with `square_root`.

    A matrix with singular values `s`, stacked on `c * I` for the bound `c`, has the singular
    values `sqrt(s^2 + c^2)`. None of them is below `c`, so the iteration converges for all. It
    brings them to one and leaves the blocks `s / sqrt(s^2 + c^2)` and `c / sqrt(s^2 + c^2)`, a
    sine and a cosine. `c` times the sine is `square_root`. For `hard`, the sine is divided by the
    larger of sine and cosine: the quotient is 1 where `s > c` and `s / c` elsewhere.
    """
    scaled, unit, _ = in_units(x)
    relative = (max_norm[..., None] / unit)[..., None]
    bound = max_norm[..., None, None].astype(x.dtype)
    squares = jnp.sum(jnp.square(jnp.abs(scaled)), axis=(-2, -1), keepdims=True)
    size = jnp.sqrt(squares + jnp.square(relative))
    # A product with the inverse, because XLA would merge two divisions into one by the product of
    # the divisors, which overflows.
    inverse = 1 / jnp.where(size > 0, size, 1)
    least = relative * inverse
    sine, cosine = _orthogonalized(
        [scaled * inverse.astype(x.dtype), least.astype(x.dtype) * _eye_for(x)],
        least,
        iterations,
    )
    if not is_hard:
        return bound * sine
    below, above = matmul(cosine, cosine), matmul(adjoint(sine), sine)
    # The iteration does not resolve the sign of values nearer to the bound than this. There the
    # sine equals the cosine, so either sign is right.
    nearest = _placement.filled_like(relative, min(1.0, 2.5 ** (3 - iterations)))
    (sign,) = _orthogonalized([below - above], nearest, iterations)
    larger = (below + above + matmul(below - above, sign)) / 2
    return bound * matmul(sine, _inverse_root(larger))


def _orthogonalized(blocks: Sequence[Array], least: Array, iterations: int) -> Sequence[Array]:
    """Brings the singular values of stacked blocks, which lie in [least, 1], to one.

    This is the scaled Newton-Schulz iteration of Chen and Chow. Each step multiplies small values
    by up to half of sqrt(27), until none is small and all converge quadratically. None exceeds
    one.
    """
    eye = _eye_for(blocks[-1])

    def step(_: Array, carry: tuple[Sequence[Array], Array]) -> tuple[Sequence[Array], Array]:
        blocks, least = carry
        floor = jnp.maximum(least, _LEAST_FOR_SCALE)
        scale = jnp.sqrt(3 / (1 + floor + jnp.square(floor)))
        gram = sum(matmul(adjoint(block), block) for block in blocks)
        cubed = (scale**3).astype(eye.dtype) * gram
        factor = (3 * scale).astype(eye.dtype) / 2 * eye - cubed / 2
        least = scale * least * (3 - jnp.square(scale * least)) / 2
        return [matmul(block, factor) for block in blocks], least

    return jax.lax.fori_loop(0, iterations, step, (list(blocks), least))[0]


def _inverse_root(x: Array) -> Array:
    """`x^(-1/2)` of a Hermitian matrix with eigenvalues in [1/2, 1], by a coupled iteration."""
    eye = _eye_for(x)

    def step(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        root, inverse = carry
        factor = (3 * eye - matmul(inverse, root)) / 2
        return matmul(root, factor), matmul(factor, inverse)

    start = x, eye + 0 * x
    return jax.lax.fori_loop(0, _STEPS_OF_INVERSE_ROOT, step, start)[1]


def _eye_for(x: Array) -> Array:
    eye = jnp.eye(x.shape[-1], dtype=x.dtype)
    return jnp.expand_dims(eye, tuple(range(x.ndim - 2)))
