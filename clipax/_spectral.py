"""Functions of singular values: by their decomposition, or by matrix products alone.

A matrix is the last two axes of an array and has at least as many rows as columns. It
is divided by its largest entry first, so that no square leaves the range of its dtype.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax import _leaves
from clipax._typing import Array, Coefficient
from clipax.coefficients import hard

# Without it, accelerators round float32 factors to ten bits or fewer.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

_SQUARINGS = 10
_STEPS_OF_INVERSE_ROOT = 6
# With less, the scaled iteration would bring what rounding leaves above one beyond zero.
_LEAST_FOR_SCALE = 0.03


class Decomposition(NamedTuple):
    """`x = u @ diag(s) @ vh`."""

    u: Array
    s: Array
    vh: Array


class Measured(NamedTuple):
    """What is known of matrices, as a constant to differentiation."""

    norm: Array
    """The largest singular value, or a bound on it; not finite where the matrix is not."""
    parts: Any
    """A `Decomposition`, or None."""


# Both are jitted so that eager calls are cached, and inlined under an outer jit.
@functools.partial(jax.jit, static_argnums=1, inline=True)
def measure(x: Array, iterations: int | None) -> Measured:
    """Decomposes, or measures by matrix products if iterations are given."""
    x = jax.lax.stop_gradient(x)
    if iterations is None:
        parts = _decompose(x)
        return Measured(parts.s[..., 0], parts)
    return Measured(_schatten_norm(x), None)


@functools.partial(jax.jit, static_argnums=(3, 4), inline=True)
def clip(
    x: Array,
    measured: Measured,
    max_norm: Array,
    coefficient: Coefficient,
    iterations: int | None,
) -> Array:
    """Clips the singular values of the matrices that are to be scaled."""
    is_kept = coefficient(measured.norm, max_norm) == 1
    # It keeps bounds that no product may see, as inf, out of the derivative.
    bound = jnp.where(is_kept, measured.norm, max_norm)
    clipped = _clip(coefficient, iterations, x, measured.parts, bound)
    return jnp.where(jnp.isfinite(measured.norm)[..., None, None], clipped, jnp.nan)


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
        return _by_products(x, max_norm, coefficient is hard, iterations)
    bound = jnp.broadcast_to(max_norm[..., None], parts.s.shape)
    return _product(parts, _clipped(coefficient, parts.s, bound))


@_clip.defjvp
def _clip_jvp(
    coefficient: Coefficient,
    iterations: int | None,
    primals: tuple[Array, Decomposition | None, Array],
    tangents: tuple[Array, Any, Array],
) -> tuple[Array, Array]:
    """Differentiates the function of singular values, by whatever it was computed.

    JAX's rule for the decomposition would divide by what two singular values differ, and
    iterations on their way to the limit have a derivative far from the limit's.
    """
    x, given, max_norm = primals
    x_dot, _, max_norm_dot = tangents
    parts = _decompose(x) if given is None else given
    u, s, vh = parts
    # Under a bound of zero, singular values that are rounding alone have no finite slope.
    least = np.finfo(s.dtype).eps * s[..., :1]
    bound = jnp.broadcast_to(jnp.maximum(max_norm[..., None], least), s.shape)
    bound_dot = jnp.broadcast_to(max_norm_dot[..., None], s.shape)
    function = functools.partial(_clipped, coefficient)
    f, f_dot = jax.jvp(function, (s, bound), (jnp.zeros_like(s), bound_dot))

    inside = _matmul(_matmul(_adjoint(u), x_dot), _adjoint(vh))
    outside = _matmul(x_dot, _adjoint(vh)) - _matmul(u, inside)
    even, odd = (inside + _adjoint(inside)) / 2, (inside - _adjoint(inside)) / 2
    by_difference, by_sum = _quotients(function, s, f, bound)
    inside = even * by_difference.astype(u.dtype) + odd * by_sum.astype(u.dtype)
    outside = outside * coefficient(s, bound)[..., None, :].astype(u.dtype)
    moved = _matmul(_matmul(u, inside) + outside, vh) + _product(parts, f_dot)
    return _clip(coefficient, iterations, x, given, max_norm), moved


def _quotients(
    function: Callable[..., Array], s: Array, f: Array, bound: Array
) -> tuple[Array, Array]:
    """`(f_i - f_j) / (s_i - s_j)`, `(f_i + f_j) / (s_i + s_j)`, and the slope where they end."""
    total, difference = (s[..., :, None] + sign * s[..., None, :] for sign in (1, -1))
    f_total, f_difference = (f[..., :, None] + sign * f[..., None, :] for sign in (1, -1))
    mean, bounds = total / 2, jnp.broadcast_to(bound[..., None], total.shape)
    _, slope = jax.jvp(function, (mean, bounds), (jnp.ones_like(mean), jnp.zeros_like(mean)))
    # Where rounding would do more to the quotient than the slope at the mean misses.
    is_apart = jnp.abs(difference) > np.finfo(s.dtype).eps ** (1 / 3) * total
    by_difference = jnp.where(is_apart, f_difference / jnp.where(is_apart, difference, 1), slope)
    by_sum = jnp.where(total > 0, f_total / jnp.where(total > 0, total, 1), slope)
    return by_difference, by_sum


def _clipped(coefficient: Coefficient, s: Array, bound: Array) -> Array:
    return s * coefficient(s, bound)


def _product(parts: Decomposition, s: Array) -> Array:
    return _matmul(parts.u * s[..., None, :].astype(parts.u.dtype), parts.vh)


def _decompose(x: Array) -> Decomposition:
    scaled, unit, largest = _in_units(x)
    u, s, vh = jnp.linalg.svd(scaled, full_matrices=False)
    return Decomposition(u, jnp.where(jnp.isfinite(largest), s * unit, largest), vh)


def _schatten_norm(x: Array) -> Array:
    """`(sum_i s_i^2048)^(1/2048)`: at least the largest of n, and at most n^(1/2048) times it."""
    scaled, unit, largest = _in_units(x)

    def square(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        power, norm = carry
        trace = jnp.trace(power, axis1=-2, axis2=-1).real[..., None]
        divisor = jnp.where(trace > 0, trace, 1).astype(power.dtype)[..., None]
        power = power / divisor
        return _matmul(power, power), norm * trace ** (0.5 ** (step + 1).astype(trace.dtype))

    start = _matmul(_adjoint(scaled), scaled), _leaves.filled_like(unit, 1.0)
    _, norm = jax.lax.fori_loop(0, _SQUARINGS + 1, square, start)
    return jnp.where(jnp.isfinite(largest), norm * unit, largest)[..., 0]


def _by_products(x: Array, max_norm: Array, is_hard: bool, iterations: int) -> Array:
    """Clips singular values by Newton-Schulz iterations: by `hard`, or else by `square_root`.

    Stacked on `c * I`, a matrix with singular values s has the values sqrt(s^2 + c^2), none
    below c. Brought to one, they leave s / sqrt(s^2 + c^2) above and c / sqrt(s^2 + c^2)
    below: a sine and a cosine, whose quotient is s / c, at most one where the sine is less.
    """
    scaled, unit, _ = _in_units(x)
    relative = (max_norm[..., None] / unit)[..., None]
    bound = max_norm[..., None, None].astype(x.dtype)
    squares = jnp.sum(jnp.square(jnp.abs(scaled)), axis=(-2, -1), keepdims=True)
    size = jnp.sqrt(squares + jnp.square(relative))
    # No second division: XLA would divide by the product of the divisors, which overflows.
    inverse = 1 / jnp.where(size > 0, size, 1)
    least = relative * inverse
    sine, cosine = _orthogonalized(
        [scaled * inverse.astype(x.dtype), least.astype(x.dtype) * _eye_for(x)],
        least,
        iterations,
    )
    if not is_hard:
        return bound * sine
    below, above = _matmul(cosine, cosine), _matmul(_adjoint(sine), sine)
    # What is nearer to the bound than this has no sign yet, and needs none: both sides agree.
    nearest = _leaves.filled_like(relative, min(1.0, 2.5 ** (3 - iterations)))
    (sign,) = _orthogonalized([below - above], nearest, iterations)
    larger = (below + above + _matmul(below - above, sign)) / 2
    return bound * _matmul(sine, _inverse_root(larger))


def _orthogonalized(blocks: Sequence[Array], least: Array, iterations: int) -> Sequence[Array]:
    """Brings the singular values of stacked blocks, which lie in [least, 1], to one.

    The scaled Newton-Schulz iteration: values as small as `least` grow by half of
    sqrt(27) a step, until none is small and they converge quadratically. None exceeds one.
    """
    eye = _eye_for(blocks[-1])

    def step(_: Array, carry: tuple[Sequence[Array], Array]) -> tuple[Sequence[Array], Array]:
        blocks, least = carry
        floor = jnp.maximum(least, _LEAST_FOR_SCALE)
        scale = jnp.sqrt(3 / (1 + floor + jnp.square(floor)))
        gram = sum(_matmul(_adjoint(block), block) for block in blocks)
        cubed = (scale**3).astype(eye.dtype) * gram
        factor = (3 * scale).astype(eye.dtype) / 2 * eye - cubed / 2
        least = scale * least * (3 - jnp.square(scale * least)) / 2
        return [_matmul(block, factor) for block in blocks], least

    return jax.lax.fori_loop(0, iterations, step, (list(blocks), least))[0]


def _inverse_root(x: Array) -> Array:
    """`x^(-1/2)` of a Hermitian matrix with eigenvalues in [1/2, 1], by the coupled iteration."""
    eye = _eye_for(x)

    def step(_: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        root, inverse = carry
        factor = (3 * eye - _matmul(inverse, root)) / 2
        return _matmul(root, factor), _matmul(factor, inverse)

    start = x, eye + 0 * x
    return jax.lax.fori_loop(0, _STEPS_OF_INVERSE_ROOT, step, start)[1]


def _in_units(x: Array) -> tuple[Array, Array, Array]:
    """Matrices over their largest entry, that unit, and the entry, finite or not."""
    parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
    largest = functools.reduce(jnp.maximum, [jnp.max(jnp.abs(y), axis=(-2, -1)) for y in parts])
    largest = largest[..., None]
    is_finite = jnp.isfinite(largest)
    unit = jnp.where(is_finite, _leaves.unit_of(largest), 1)
    # Decompositions of NaN can hang, and part by part no complex quotient overflows.
    parts = [jnp.where(is_finite[..., None], y, 0) / unit[..., None] for y in parts]
    return parts[0] if len(parts) == 1 else jax.lax.complex(*parts), unit, largest


def _adjoint(x: Array) -> Array:
    return jnp.conj(jnp.swapaxes(x, -2, -1))


def _eye_for(x: Array) -> Array:
    eye = jnp.eye(x.shape[-1], dtype=x.dtype)
    return jnp.expand_dims(eye, tuple(range(x.ndim - 2)))
