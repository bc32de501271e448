"""Norms whose sums stay in the range of floats: Blue's algorithm, or one sum and a branch.

A sum of squares overflows from entries of 2^64 and loses those below 2^-63. Blue's algorithm
sums three times in one read: as it is, scaled down, and scaled up. The sum in range is taken.

    order        where       sharded  form
    1            everywhere  either   one sum of moduli (a)
    inf          CPU         no       a maximum of floats, and a sum that finds NaN (b)
    inf          elsewhere   either   a maximum of bits (c)
    2            CPU         no       one sum, and a second read if it left the range (d)
    2, of units  GPU         no       one sum in float64 (e)
    2            GPU         no       three sums, small leaves that are alike in one stack (f)
    2            TPU         no       three sums, fused with what makes the gradient (g)
    2            everywhere  yes      three sums (h)
    other        everywhere  either   a sum of powers of entries over the largest one (i)

Each form is there because of what a test or a measurement shows:

    a  It is in range if the norm is: `test_any_representable_norm_is_measured`.
    b  Maxima of integers are scalar loops on a CPU: `python -m benchmarks`, `clip_by_value`.
    c  A maximum of floats can drop a NaN: `test_nan_and_inf_reach_their_norm_and_no_other`.
    d  It reads no faster than it computes, and accelerators do: `test_accelerators_read_once`.
    e  XLA writes scaled copies of columns to memory: `test_gpus_sum_units_in_doubles`.
    f  A GPU launches kernels for each sum: `test_small_leaves_share_kernels`.
    g  A second read is not fused: `test_one_chip_compiles_it_without_another_pass`.
    h  Devices could take different branches, and wait for each other in them:
       `test_collectives_do_not_grow_with_the_number_of_leaves`.
    i  No power of the others overflows: `test_global_norm_of_any_order_and_dtype`.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _compat, _leaves
from clipax._core._typing import Array


class Layout(NamedTuple):
    """How one array is reduced."""

    axes: tuple[int, ...]
    """The axes that are summed over."""
    shards: tuple[Hashable, ...]
    """The mapped axes over which the sum goes on."""
    divisor: float = 1.0
    """What the sum of squares is divided by, as n for a root mean square."""


class _Range(NamedTuple):
    """Where sums of squares are trusted, and the scales that bring the others there."""

    lowest_sum: float
    scale_of_huge: float
    scale_of_tiny: float


_RANGES = {
    jnp.dtype(np.float32): _Range(2.0**-64, 2.0**-90, 2.0**63),
    jnp.dtype(np.float64): _Range(2.0**-900, 2.0**-600, 2.0**511),
}


# A reduction across devices can drop a NaN from a maximum of floats. As integers, the bits of
# numbers >= 0 have the same order, and NaN comes last.
def _as_bits(x: Array) -> Array:
    integer = jnp.dtype(f"int{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type(x, integer) & np.iinfo(integer).max


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _largest(x: Array, axis: tuple[int, ...] | None, keepdims: bool) -> Array:
    bits = jnp.max(_as_bits(x), axis=axis, keepdims=keepdims, initial=0)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@_largest.defjvp
def _largest_jvp(axis: Any, keepdims: bool, primals: Any, tangents: Any) -> Any:
    derived = functools.partial(jnp.max, axis=axis, keepdims=keepdims, initial=0.0)
    return _largest(*primals, axis, keepdims), jax.jvp(derived, primals, tangents)[1]


def _largest_of(x: Array, axis: Any = None, keepdims: bool = False) -> Array:
    return _largest(x, axis, keepdims)


_MAX_ACROSS: Callable[..., Any] = jax.lax.pmax


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest_across(parts: list[Array], axes: Any) -> list[Array]:
    bits = _MAX_ACROSS([_as_bits(part) for part in parts], axes)
    pairs = zip(bits, parts, strict=True)
    return [jax.lax.bitcast_convert_type(each, part.dtype) for each, part in pairs]


@_largest_across.defjvp
def _largest_across_jvp(axes: Any, primals: Any, tangents: Any) -> Any:
    # Of a maximum over devices there is no derivative, and this says so.
    return jax.jvp(lambda parts: _MAX_ACROSS(parts, axes), primals, tangents)


Operation = tuple[Callable[..., Array], Callable[..., Any]]


Scales = Sequence[Any] | None


_SUM: Operation = (jnp.sum, jax.lax.psum)


_MAX: Operation = (_largest_of, _largest_across)


_FLOAT_MAX: Operation = (functools.partial(jnp.max, initial=0), _MAX_ACROSS)


# What is read of these shares nothing with what becomes of the updates. XLA would else make
# their squares once for a norm and for Adam, or convert a leaf of half the width once for a norm
# and for its scaling, and keep that in memory. Each waits for itself only.
def _apart(arrays: Sequence[Array]) -> list[Array]:
    return [_compat.optimization_barrier(array) for array in arrays]


def _for_one_read(arrays: Sequence[Array]) -> list[Array]:
    """The arrays, so that several sums over each become one read of it."""

    def as_they_are(*arrays: Array) -> list[Array]:
        return list(arrays)

    def apart(*arrays: Array) -> list[Array]:
        return _apart(arrays)

    # A TPU sums a gradient in the kernel that makes it. A GPU does not, and joins its sums
    # only if what they read is not known to be the result of a matrix product.
    return list(jax.lax.platform_dependent(*arrays, tpu=as_they_are, default=apart))


def told_apart(scale: Any, number: int) -> list[Any]:
    """The scale so often, and the compiler does not know that it is one."""
    if isinstance(scale, float):
        return [scale] * number
    return list(_compat.optimization_barrier(jnp.stack([scale] * number)))


Reduce = Callable[..., list[Array]]


_Roots = Callable[[list[Array]], list[Array]]


_Branch = Callable[[Sequence[Array]], list[Array]]


_Form = Callable[[Reduce, _Roots, Sequence[Array]], list[Array]]


def p_norms(
    reduce: Reduce,
    arrays: Sequence[Array],
    layouts: Sequence[Layout],
    ord: float,
    divisors: Sequence[float],
    reduce_stacked: Reduce | None = None,
) -> list[Array]:
    """`(sum |x|^p)^(1/p)` from sums of scaled entries that stay in range."""
    is_reduced_across = any(layout.shards for layout in layouts)
    if ord == math.inf:
        return _largest_entries(reduce, reduce_stacked, arrays, is_reduced_across)
    if ord == 1:
        return reduce(arrays, _SUM, 1.0)

    def roots(sums: list[Array]) -> list[Array]:
        return [_root(part / n, ord) for part, n in zip(sums, divisors, strict=True)]

    if ord != 2:
        largest = _largest_entries(reduce, reduce_stacked, arrays, is_reduced_across)
        units = [finite_or_one(each) for each in largest]
        norms = roots(reduce(arrays, _SUM, ord, units))
        return [_in_range(norm, unit) for norm, unit in zip(norms, units, strict=True)]

    # Where units are sharded, devices could take different branches, and wait in one of them
    # for those in the other.
    if is_reduced_across:
        return _at_every_scale(reduce, roots, arrays)

    def branch(form: _Form, reduce: Reduce) -> _Branch:
        return functools.partial(form, reduce, roots)

    # For sums of columns, a GPU's compiler writes what it has scaled to memory first.
    doubled = _are_of_units(arrays, layouts) and _can_be_doubled(arrays)
    on_gpus = branch(_in_doubles if doubled else _at_every_scale, reduce_stacked or reduce)
    return _by_platform(
        arrays,
        # An accelerator computes faster than it reads; and what may be read again cannot be
        # fused with what produces it.
        default=branch(_at_every_scale, reduce),
        cpu=branch(_at_the_right_scale, reduce),
        gpu=on_gpus if doubled or reduce_stacked else None,
    )


def _by_platform(
    arrays: Sequence[Array], *, default: _Branch, cpu: _Branch, gpu: _Branch | None
) -> list[Array]:
    branches = {"default": default, "cpu": cpu}
    if gpu is not None:
        branches |= dict.fromkeys(("cuda", "rocm"), jax.jit(gpu, inline=True))  # traced once
    result: list[Array] = jax.lax.platform_dependent(list(arrays), **branches)
    return result


def _largest_entries(
    reduce: Reduce,
    reduce_stacked: Reduce | None,
    arrays: Sequence[Array],
    is_reduced_across: bool,
) -> list[Array]:
    def of_floats(arrays: Sequence[Array]) -> list[Array]:
        sums = reduce(_apart(arrays), _SUM, 2.0)
        rows = zip(sums, reduce(_apart(arrays), _FLOAT_MAX, 1.0), strict=True)
        return [jnp.where(jnp.isnan(part), jnp.nan, largest) for part, largest in rows]

    def of_integers(reduce: Reduce, arrays: Sequence[Array]) -> list[Array]:
        return reduce(arrays, _MAX, 1.0)

    if is_reduced_across:
        return of_integers(reduce, arrays)
    return _by_platform(
        arrays,
        default=functools.partial(of_integers, reduce),
        # A CPU's library reduces floats alone, and them many times as fast.
        cpu=of_floats,
        gpu=functools.partial(of_integers, reduce_stacked) if reduce_stacked else None,
    )


def _at_the_right_scale(reduce: Reduce, roots: _Roots, arrays: Sequence[Array]) -> list[Array]:
    """Norms that are read again only where their sum of squares left the range."""
    plain = reduce(_apart(arrays), _SUM, 2.0)
    scales = [_scale_for(part) for part in plain]
    in_range = functools.reduce(jnp.logical_and, [jnp.all(scale == 1) for scale in scales])

    def rescaled() -> list[Array]:
        norms = roots(reduce(arrays, _SUM, 2.0, scales))
        return [norm / scale for norm, scale in zip(norms, scales, strict=True)]

    return list(jax.lax.cond(in_range, lambda: roots(plain), rescaled))


def _in_doubles(reduce: Reduce, roots: _Roots, arrays: Sequence[Array]) -> list[Array]:
    """Norms from sums of squares in twice the width, which have every float32 in their range."""
    with _compat.doubles():
        wide = [_leaves.widened(array, np.float64) for array in arrays]
        return [norm.astype(np.float32) for norm in roots(reduce(wide, _SUM, 2.0))]


def _at_every_scale(reduce: Reduce, roots: _Roots, arrays: Sequence[Array]) -> list[Array]:
    """Norms from three sums of squares in one read, each taken where it is in range."""
    arrays = _for_one_read(arrays)
    plain = reduce(arrays, _SUM, 2.0)
    ranges = [_RANGES[part.dtype] for part in plain]
    as_huge = roots(reduce(arrays, _SUM, 2.0, [within.scale_of_huge for within in ranges]))
    as_tiny = roots(reduce(arrays, _SUM, 2.0, [within.scale_of_tiny for within in ranges]))
    rows = zip(plain, ranges, roots(plain), as_huge, as_tiny, strict=True)
    return [
        jnp.where(
            part < within.lowest_sum,
            tiny / within.scale_of_tiny,
            jnp.where(part == jnp.inf, huge / within.scale_of_huge, norm),
        )
        for part, within, norm, huge, tiny in rows
    ]


def _can_be_doubled(arrays: Sequence[Array]) -> bool:
    widths = {_leaves.wide_dtype(array.dtype) for array in arrays}
    return _compat.HAS_DOUBLES and widths == {np.dtype(np.float32)}


def _are_of_units(arrays: Sequence[Array], layouts: Sequence[Layout]) -> bool:
    rows = zip(arrays, layouts, strict=True)
    return any(len(layout.axes) < array.ndim for array, layout in rows)


@jax.custom_jvp
def _square(modulus: Array, signed: Array) -> Array:
    """The square of a modulus, with the derivative of that of the signed: it has no corner."""
    del signed
    return modulus * modulus


@_square.defjvp
def _square_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    signed, signed_dot = primals[1], tangents[1]
    return _square(*primals), signed * signed_dot + signed_dot * signed


def powers(x: Array, width: Any, scale: Any, power: float) -> Array:
    """|scale * x|^2 or |x / scale|^power in the given width."""

    def squared(part: Array) -> Array:
        # By products: of a square, the derivative 2 * x overflows for the largest floats.
        if scale is None:
            return part.astype(width) * part.astype(width)
        signed = part.astype(width) * scale
        # XLA keeps this maximum: of constants, it would else square the scale first. What it
        # puts in the place of zero has a square of zero. Taken from the scale, lest leaves of
        # one shape share it: then it would be spread out for all of them, and kept in memory.
        modulus = jnp.maximum(jnp.abs(signed), jnp.minimum(scale, np.finfo(width).tiny))
        # Entries that are not tiny must stay finite too, or their derivative would be NaN.
        if isinstance(scale, float) and scale > 1:
            modulus, signed = jnp.minimum(modulus, scale), jnp.clip(signed, -scale, scale)
        return _square(modulus, signed)

    if power == 2:
        if jnp.iscomplexobj(x):
            return squared(x.real) + squared(x.imag)
        return squared(x)
    modulus = jnp.abs(x).astype(width)
    if scale is None:
        return modulus
    modulus = modulus / scale
    # The inner `where` keeps the derivative of x**p finite at zero for p < 1. Zero and NaN are
    # their own powers, and the derivative of a modulus at zero is not that of its power.
    kept = jax.lax.stop_gradient(modulus)
    return jnp.where(modulus > 0, jnp.where(modulus > 0, modulus, 1.0) ** power, kept)


def _scale_for(sums: Array) -> Array:
    within = _RANGES[sums.dtype]
    one, huge, tiny = (
        jnp.full_like(sums, scale) for scale in (1.0, within.scale_of_huge, within.scale_of_tiny)
    )
    return jnp.where(sums < within.lowest_sum, tiny, jnp.where(sums == jnp.inf, huge, one))


def finite_or_one(largest: Array) -> Array:
    usable = (largest > 0) & jnp.isfinite(largest)
    # A norm does not depend on its unit, and neither does its derivative.
    return jax.lax.stop_gradient(jnp.where(usable, _leaves.unit_of(largest), 1.0))


def _in_range(norm: Array, unit: Array) -> Array:
    """`norm * unit`, which is no float only if the exact norm is none."""
    last = np.finfo(norm.dtype).max * (1 - 1e-6) / unit
    is_rounded_out = (norm > last) & (norm * (1 - 4e-6) <= last)
    return jnp.where(is_rounded_out, last, norm) * unit


def _root(sums: Array, power: float) -> Array:
    """sums**(1/power) with a derivative of zero, not NaN, at zero."""
    positive = jnp.where(sums > 0, sums, jnp.ones_like(sums))
    root = jnp.sqrt(positive) if power == 2 else positive ** (1 / power)
    # A NaN is not > 0 and must come through.
    return jnp.where(sums > 0, root, sums)
