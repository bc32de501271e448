"""Derivatives of functions of singular values, valid where these are equal or zero.

JAX's derivative of a decomposition divides by differences of singular values and fails where two
are equal. The derivative of `u @ diag(f(s)) @ vh` exists there, and this module computes it from
eigenvalues. The matrix `[[0, x], [x^H, 0]]`, for `x = u @ diag(s) @ vh` with at least as many rows
as columns, is Hermitian. Its eigenvalues are `s`, `-s`, and one zero for each dimension of rows
that `u` does not span. With `f(-s) = -f(s)`, the function of singular values is a function of
these eigenvalues, whose derivatives are sums over divided differences: `f[a, b]` for the first
derivative and `f[a, b, c]` for the second. A divided difference of two equal values is a slope.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _compat, _leaves
from clipax._core._typing import Array, Coefficient

# By default, accelerators round float32 factors to ten bits or fewer.
matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Decomposition(NamedTuple):
    """`x = u @ diag(s) @ vh`."""

    u: Array
    s: Array
    vh: Array


class Seen(NamedTuple):
    """A direction in the coordinates of a decomposition."""

    inside: Array
    """`u^H @ direction @ v`."""
    outside: Array
    """The part of `direction @ v` outside of the columns of `u`."""


@functools.partial(jax.jit, inline=True)
def decompose(x: Array) -> Decomposition:
    scaled, unit, largest = in_units(x)
    u, s, vh = jnp.linalg.svd(scaled, full_matrices=False)
    return Decomposition(u, jnp.where(jnp.isfinite(largest), s * unit, largest), vh)


@functools.partial(jax.jit, inline=True)
def product(parts: Decomposition, s: Array) -> Array:
    return matmul(parts.u * s[..., None, :].astype(parts.u.dtype), parts.vh)


def adjoint(x: Array) -> Array:
    return jnp.conj(jnp.swapaxes(x, -2, -1))


def in_units(x: Array) -> tuple[Array, Array, Array]:
    """Matrices divided by a unit near their largest entry, that unit, and the entry."""
    parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(y), axis=(-2, -1)) for y in parts])
    largest = largest[..., None]
    is_finite = jnp.isfinite(largest)
    # The unit cancels from every result, so it needs no derivative.
    unit = jax.lax.stop_gradient(jnp.where(is_finite, _leaves.unit_of(largest), 1))
    # Entries that are not finite become zero, because the decomposition of NaN can hang. The parts
    # are divided separately, because a complex quotient can overflow.
    parts = [jnp.where(is_finite[..., None], y, 0) / unit[..., None] for y in parts]
    return parts[0] if len(parts) == 1 else jax.lax.complex(*parts), unit, largest


@jax.custom_jvp
def largest(x: Array, given: Decomposition) -> Array:
    """The largest singular value, from a given decomposition of `x`."""
    del x
    return given.s[..., 0]


@largest.defjvp
def _largest_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    parts, _ = attached(*primals)

    def along(parts: Decomposition, x_dot: Array) -> Array:
        columns = matmul(x_dot, adjoint(parts.vh[..., :1, :]))
        s_dot = jnp.sum((jnp.conj(parts.u[..., :1]) * columns).real, axis=(-2, -1))
        # A norm has a corner at zero, where its derivative counts as zero.
        return jnp.where(parts.s[..., 0] == 0, 0, s_dot)

    value = lasting(largest(*primals), functools.partial(along, primals[1]), primals[0])
    return value, along(parts, tangents[0])


def lasting(value: Array, derivative: Any, *arguments: Array) -> Array:
    """Returns the value of a rule with its derivative built in, where JAX would lose the rule.

    Before jax 0.12, the second derivative of a scan ignores derivative rules. So the value is
    returned as a constant plus a term that is zero but has the derivative.
    """
    if _compat.RULES_LAST:
        return value
    value = jax.lax.stop_gradient(value)
    return value + derivative(*[x - jax.lax.stop_gradient(x) for x in arguments])


@jax.custom_jvp
def _attached(x: Array, given: Decomposition) -> tuple[Decomposition, Seen]:
    del x
    # Products with zero, because plain zeros would not vary over mapped axes as the parts do.
    return given, Seen(0 * given.vh, 0 * given.u)


@_attached.defjvp
def _attached_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    parts, unresolved = _attached(*primals)
    return (parts, unresolved), _parts_by(parts, tangents[0])


def attached(x: Array, given: Decomposition) -> tuple[Decomposition, Seen]:
    """Gives a decomposition of `x` its derivative with respect to `x`.

    Singular vectors of equal values can rotate among themselves, so their derivative does not
    exist. Here they do not rotate. The second result is zero, and its derivative is the part of
    the direction that would rotate them; `derivative` accounts for that part.
    """
    if _compat.RULES_LAST:
        return _attached(x, given)
    given = jax.lax.stop_gradient(given)
    parts_dot, unresolved = _parts_by(given, x - jax.lax.stop_gradient(x))
    return jax.tree.map(jnp.add, given, parts_dot), unresolved


def _parts_by(parts: Decomposition, x_dot: Array) -> tuple[Decomposition, Seen]:
    seen, gaps = seen_by(parts, x_dot), _gaps(parts.s)
    even, odd = _halves(seen.inside)
    by_difference = even * _inverse(gaps.difference, gaps.are_apart).astype(even.dtype)
    by_sum = odd * _inverse(gaps.total, gaps.are_above).astype(odd.dtype)
    outside = seen.outside * _inverse(parts.s, gaps.is_nonzero)[..., None, :].astype(odd.dtype)
    u_dot = matmul(parts.u, by_sum - by_difference) + outside
    vh_dot = matmul(by_difference + by_sum, parts.vh)
    s_dot = jnp.diagonal(even, axis1=-2, axis2=-1).real
    is_turned = ~gaps.are_apart & ~np.eye(even.shape[-1], dtype=bool)
    rest = Seen(
        jnp.where(is_turned, even, 0) + jnp.where(gaps.are_above, 0, odd),
        jnp.where(gaps.is_nonzero[..., None, :], 0, seen.outside),
    )
    return Decomposition(u_dot, s_dot, vh_dot), rest


def seen_by(parts: Decomposition, direction: Array) -> Seen:
    along = matmul(direction, adjoint(parts.vh))
    inside = matmul(adjoint(parts.u), along)
    return Seen(inside, along - matmul(parts.u, inside))


def derivative(
    coefficient: Coefficient,
    parts: Decomposition,
    unresolved: Seen | None,
    bound: Array,
    tangents: tuple[Array, Array],
) -> Array:
    """The derivative of `u @ diag(f(s)) @ vh` with respect to `x` and the bound.

    Here `f(s) = s * coefficient(s, bound)`. The result is linear in the tangents, and it can be
    differentiated again if the parts are `attached` to `x`.
    """
    x_dot, bound_dot = tangents
    s, kind = parts.s, parts.u.dtype
    # The floor under the bound: with a bound of zero, singular values that are only rounding
    # errors would have an infinite slope.
    least = jax.lax.stop_gradient(np.finfo(s.dtype).eps * s[..., :1])
    bound = jnp.broadcast_to(jnp.maximum(bound[..., None], least), s.shape)
    bound_dot = jnp.broadcast_to(bound_dot[..., None], s.shape)
    first, second = _divided_differences(coefficient, s, bound)
    f_by_bound, mixed = _by_bound(coefficient, s, bound)

    seen = seen_by(parts, x_dot)
    even, odd = _halves(seen.inside)
    inside = even * first.with_same.astype(kind) + odd * first.with_opposite.astype(kind)
    outside = seen.outside * first.with_zero[..., None, :].astype(kind)

    if unresolved is not None:
        # These terms are zero, but their derivative is that of the vectors that do not rotate.
        moved_bound = (mixed * bound_dot)[..., None, :].astype(kind)
        more = _second_derivative(second, unresolved, seen)
        inside = inside + more.inside + unresolved.inside * moved_bound
        outside = outside + more.outside + unresolved.outside * moved_bound
    moved = matmul(matmul(parts.u, inside) + outside, parts.vh)
    return moved + product(parts, f_by_bound * bound_dot)


def _second_derivative(second: "_Second", one: Seen, other: Seen) -> Seen:
    """The second derivative along two directions.

    The first direction connects only singular values that are equal or zero, so only divided
    differences with a repeated argument occur.
    """
    kind = one.inside.dtype
    forth = matmul(one.inside, adjoint(other.inside))
    back = matmul(adjoint(one.inside), other.inside)
    back = back + matmul(adjoint(one.outside), other.outside)
    same = (forth + back) / 2 * second.with_same.astype(kind)
    opposite = (forth - back) / 2 * second.with_opposite.astype(kind)
    of_zeros = matmul(one.outside, adjoint(other.inside))
    with_zero = matmul(other.outside, adjoint(one.inside))
    return Seen(
        same + adjoint(same) + adjoint(opposite) - opposite,
        of_zeros * second.of_zeros[..., None, :].astype(kind)
        + with_zero * second.with_zero[..., None, :].astype(kind),
    )


class _Gaps(NamedTuple):
    """The distances of singular values from each other, from their negatives and from zero."""

    difference: Array
    """`s_i - s_j`."""
    total: Array
    """`s_i + s_j`."""
    are_apart: Array
    are_above: Array
    is_nonzero: Array


def _gaps(s: Array) -> _Gaps:
    difference, total = s[..., :, None] - s[..., None, :], s[..., :, None] + s[..., None, :]
    eps = np.finfo(s.dtype).eps
    # Below these distances, rounding outweighs what a second difference could show.
    floor = eps ** (2 / 3) * s[..., :1]
    are_apart = jnp.abs(difference) > jnp.maximum(eps ** (1 / 3) * total, floor[..., None])
    return _Gaps(difference, total, are_apart, total > floor[..., None], s > floor)


class _First(NamedTuple):
    with_same: Array
    """`f[s_i, s_j]`."""
    with_opposite: Array
    """`f[s_i, -s_j]`."""
    with_zero: Array
    """`f[0, s_j]`."""


class _Second(NamedTuple):
    with_same: Array
    """`f[s_i, s_i, s_j]`."""
    with_opposite: Array
    """`f[s_i, s_i, -s_j]`."""
    with_zero: Array
    """`f[0, s_j, s_j]`."""
    of_zeros: Array
    """`f[0, 0, s_j]`."""


def _divided_differences(
    coefficient: Coefficient, s: Array, bound: Array
) -> tuple[_First, _Second]:
    def slope_at(s: Array) -> Array:
        bounds = jnp.broadcast_to(bound[(..., *[None] * (s.ndim - bound.ndim))], s.shape)
        return _slope(functools.partial(_clipped, coefficient, bound=bounds), s)

    gaps, f, factor = _gaps(s), _clipped(coefficient, s, bound), coefficient(s, bound)
    middle, bend = jax.jvp(slope_at, (gaps.total / 2,), (jnp.ones_like(gaps.total),))
    difference, total = f[..., :, None] - f[..., None, :], f[..., :, None] + f[..., None, :]
    # Values closer than this take the slope at their mean, because rounding would spoil the
    # quotient by more than the slope misses.
    are_apart = jnp.abs(gaps.difference) > np.finfo(s.dtype).eps ** (1 / 3) * gaps.total
    close = _quotient(difference, gaps.difference, are_apart, middle)
    small = _quotient(total, gaps.total, gaps.total > 0, middle)
    # Quotients of differences that are hardly more than rounding count as constants, because
    # their derivatives would be rounding errors divided by small numbers.
    close = jnp.where(are_apart, jax.lax.stop_gradient(close), middle)
    small = jnp.where(gaps.total > 0, jax.lax.stop_gradient(small), middle)
    first = _First(
        _quotient(difference, gaps.difference, gaps.are_apart, close),
        _quotient(total, gaps.total, gaps.are_above, small),
        factor,
    )
    slope = slope_at(s)
    at_zero = coefficient(jnp.zeros_like(s), bound)
    second = _Second(
        _quotient(
            slope[..., :, None] - first.with_same, gaps.difference, gaps.are_apart, bend / 2
        ),
        _quotient(slope[..., :, None] - first.with_opposite, gaps.total, gaps.are_above, 0),
        _quotient(slope - factor, s, gaps.is_nonzero, 0),
        _quotient(factor - at_zero, s, gaps.is_nonzero, 0),
    )
    return first, _Second(*map(_finite_constant, second))


def _by_bound(coefficient: Coefficient, s: Array, bound: Array) -> tuple[Array, Array]:
    """The derivative of `f(s)` with respect to the bound, and the derivative of that by `s`."""

    def by_bound(s: Array) -> Array:
        return _slope(functools.partial(_clipped, coefficient, s), bound)

    by_bound_alone, mixed = jax.jvp(by_bound, (s,), (jnp.ones_like(s),))
    return by_bound_alone, _finite_constant(mixed)


def _clipped(coefficient: Coefficient, s: Array, bound: Array) -> Array:
    return s * coefficient(s, bound)


def _slope(function: Any, x: Array) -> Array:
    return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]


def _finite_constant(x: Array) -> Array:
    # Its other factor is zero, and inf * 0 would be NaN where this one overflows.
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(x), x, 0))


def _quotient(numerator: Array, divisor: Array, is_taken: Array, otherwise: Any) -> Array:
    return jnp.where(is_taken, numerator / jnp.where(is_taken, divisor, 1), otherwise)


def _inverse(x: Array, is_taken: Array) -> Array:
    return _quotient(jnp.ones_like(x), x, is_taken, 0)


def _halves(x: Array) -> tuple[Array, Array]:
    """The Hermitian and the anti-Hermitian part."""
    return (x + adjoint(x)) / 2, (x - adjoint(x)) / 2
