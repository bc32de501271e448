"""Norms whose sums stay in the range of floats: Blue's algorithm, or a branch.

A sum of squares overflows for entries from 2^64 and loses those below 2^-63. Blue's algorithm
sums squares three times in one read: unscaled, scaled down and scaled up. The sum that stays in
range is taken.

    order        where       sharded  form
    1            everywhere  either   one sum of moduli (a)
    inf          everywhere  either   a maximum of bits (c)
    1, inf       CPU         no       the same in two steps (k); then a maximum of floats (b)
    2            CPU         no       one sum, and a second read if it left the range (d)
    2, little    CPU         no       one sum in float64, for each leaf by itself (j)
    2, columns   CPU         no       as (d), its first sum in two steps (l)
    2, of units  GPU         no       one sum in float64 (e)
    2            GPU         no       three sums, small leaves that are alike in one stack (f)
    2            TPU         no       three sums, fused with what makes the gradient (g)
    2            everywhere  yes      three sums (h)
    other        everywhere  either   a sum of powers of entries over the largest one (i)

Each form is there because of what a test or a measurement shows:

    a  It is in range if the norm is: `test_any_representable_norm_is_measured`.
    b  Maxima of integers are scalar loops on a CPU: `python -m benchmarks`, `clip_by_value`.
    c  A maximum of floats can drop a NaN: `test_nan_and_inf_reach_their_norm_and_no_other`.
    d  Only accelerators compute so fast that three sums are free: `test_accelerators_read_once`.
    e  XLA writes scaled copies of columns to memory: `test_gpus_sum_units_in_doubles`.
    f  A GPU launches kernels for each sum: `test_small_leaves_share_kernels`.
    g  A second read is not fused: `test_one_chip_compiles_it_without_another_pass`.
    h  Devices could take different branches and then wait for each other:
       `test_collectives_do_not_grow_with_the_number_of_leaves`.
    i  The powers of the other entries do not overflow: `test_global_norm_of_any_order_and_dtype`.
    j  A branch for each of a thousand leaves takes long to compile:
       `test_cpus_sum_little_leaves_in_doubles`.
    k  What is computed to be reduced is not kept: `test_what_is_computed_is_reduced_in_one_read`.
    l  XLA takes three times as long for columns as for rows: `test_cpus_sum_columns_in_two_steps`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _compat, _leaves
from clipax._core._operations import (
    COLUMNS_IN_STEPS,
    MAX,
    MAX_IN_STEPS,
    SUM,
    SUM_IN_STEPS,
    Operation,
)
from clipax._core._powers import root
from clipax._core._stacks import Divisor, Reduction
from clipax._core._typing import Array

_Branch = Callable[[Sequence[Array]], list[Array]]


class _Range(NamedTuple):
    """Where sums of squares are trusted, and the scales that bring the others there."""

    lowest_sum: float
    scale_of_huge: float
    scale_of_tiny: float


_RANGES = {
    jnp.dtype(np.float32): _Range(2.0**-64, 2.0**-90, 2.0**63),
    jnp.dtype(np.float64): _Range(2.0**-900, 2.0**-600, 2.0**511),
}


_ZERO_AS_SQUARE = 1e-200
"""A square in float64 whose root is zero in float32, and which changes no other sum."""


class Ways(NamedTuple):
    """How one set of norms is reduced, by platform."""

    usual: Reduction
    shards: bool
    """Whether sums are completed over mapped axes."""
    units: bool
    """Whether some arrays have several norms."""
    little: bool = False
    """Whether no array is worth a branch of its own."""


def p_norms(ways: Ways, arrays: Sequence[Array]) -> list[Array]:
    """`(sum |x|^p)^(1/p)` from sums of scaled entries that stay in range."""
    order = ways.usual.ord
    if order == math.inf:
        return _largest_entries(ways, arrays)
    if order == 1:
        return _sums_of_moduli(ways, arrays)
    if order != 2:
        return _over_the_largest(ways, arrays)
    # Where arrays are sharded, devices could take different branches and then wait for each
    # other.
    if ways.shards:
        return _at_every_scale(ways.usual, arrays)
    can_be_doubled = _can_be_doubled(arrays)
    on_cpus = _in_doubles if ways.little and can_be_doubled else _at_the_right_scale
    return by_platform(
        arrays,
        # An accelerator computes faster than it reads. An array that may be read again cannot
        # be fused with the computation that makes it.
        default=functools.partial(_at_every_scale, ways.usual),
        cpu=functools.partial(on_cpus, ways.usual),
        gpu=functools.partial(norms_on_gpus, ways) if ways.units and can_be_doubled else None,
    )


def norms_on_gpus(ways: Ways, arrays: Sequence[Array]) -> list[Array]:
    """Norms of order 2 or inf that are not sharded, in the form of GPUs."""
    if ways.usual.ord == math.inf:
        return ways.usual.sums(arrays, MAX, 1.0)
    # For sums of columns, a GPU's compiler writes the scaled array to memory first.
    is_doubled = ways.units and _can_be_doubled(arrays)
    return (_in_doubles if is_doubled else _at_every_scale)(ways.usual, arrays)


def by_platform(
    arrays: Sequence[Array], *, default: _Branch, cpu: _Branch | None, gpu: _Branch | None
) -> list[Array]:
    branches = {"default": default}
    if cpu is not None:
        branches["cpu"] = cpu
    if gpu is not None:
        branches |= dict.fromkeys(("cuda", "rocm"), jax.jit(gpu, inline=True))  # traced once
    result: list[Array] = jax.lax.platform_dependent(list(arrays), **branches)
    return result


def _sums_of_moduli(ways: Ways, arrays: Sequence[Array]) -> list[Array]:
    sums = _in_one_read(ways, arrays, SUM, SUM_IN_STEPS)
    return ways.usual.roots(sums)


def _largest_entries(ways: Ways, arrays: Sequence[Array]) -> list[Array]:
    return _in_one_read(ways, arrays, MAX, MAX_IN_STEPS)


def _in_one_read(
    ways: Ways, arrays: Sequence[Array], usual: Operation, in_steps: Operation
) -> list[Array]:
    def reduced(operation: Operation, arrays: Sequence[Array]) -> list[Array]:
        return ways.usual.sums(arrays, operation, 1.0)

    if ways.shards:
        return reduced(usual, arrays)
    default, cpu = (functools.partial(reduced, operation) for operation in (usual, in_steps))
    return by_platform(arrays, default=default, cpu=cpu, gpu=None)


def _over_the_largest(ways: Ways, arrays: Sequence[Array]) -> list[Array]:
    """Norms of any order, from powers of entries in the unit of the largest one."""
    units = [finite_or_one(each) for each in _largest_entries(ways, arrays)]
    norms = ways.usual.roots(ways.usual.sums(arrays, SUM, ways.usual.ord, units))
    return [in_range(norm, unit) for norm, unit in zip(norms, units, strict=True)]


def _at_the_right_scale(reduction: Reduction, arrays: Sequence[Array]) -> list[Array]:
    """Norms that are read again only where their sum of squares left the range."""
    plain = reduction.sums(_apart(arrays), COLUMNS_IN_STEPS, 2.0)
    scales = [_scale_for(part) for part in plain]
    is_in_range = functools.reduce(jnp.logical_and, [jnp.all(scale == 1) for scale in scales])

    def rescaled() -> list[Array]:
        norms = reduction.roots(reduction.sums(arrays, SUM, 2.0, scales))
        # Before jax 0.10, a quotient has a second derivative with the square of its divisor.
        units = [jax.lax.stop_gradient(1 / scale) for scale in scales]
        return [norm * unit for norm, unit in zip(norms, units, strict=True)]

    return list(jax.lax.cond(is_in_range, lambda: reduction.roots(plain), rescaled))


def _in_doubles(reduction: Reduction, arrays: Sequence[Array]) -> list[Array]:
    """Norms from sums of squares in twice the width, where no square of a float32 overflows."""
    with _compat.doubles():
        wide = [_leaves.widened(array, np.float64) for array in arrays]
        rows = zip(reduction.sums(wide, SUM, 2.0), reduction.divisors, strict=True)
        # The small number gives the root a derivative at zero. XLA would compute a selection
        # again wherever a norm is used.
        squares = [divisor.under(part) + _ZERO_AS_SQUARE for part, divisor in rows]
        return [jnp.sqrt(square).astype(np.float32) for square in squares]


def _at_every_scale(reduction: Reduction, arrays: Sequence[Array]) -> list[Array]:
    """Norms from three sums of squares in one read, each taken where it is in range."""
    arrays = for_one_read(arrays)
    plain = reduction.sums(arrays, SUM, 2.0)
    ranges = [_RANGES[part.dtype] for part in plain]

    as_huge = reduction.sums(arrays, SUM, 2.0, [within.scale_of_huge for within in ranges])
    as_tiny = reduction.sums(arrays, SUM, 2.0, [within.scale_of_tiny for within in ranges])
    rows = zip(plain, as_huge, as_tiny, reduction.divisors, strict=True)
    return [_root_in_range(*row) for row in rows]


# Alike arrays share its trace.
@functools.partial(jax.jit, static_argnums=(3,))
def _root_in_range(plain: Array, as_huge: Array, as_tiny: Array, divisor: Divisor) -> Array:
    within = _RANGES[plain.dtype]
    norm, huge, tiny = (root(divisor.under(sums), 2) for sums in (plain, as_huge, as_tiny))
    return jnp.where(
        plain < within.lowest_sum,
        tiny / within.scale_of_tiny,
        jnp.where(plain == jnp.inf, huge / within.scale_of_huge, norm),
    )


def _can_be_doubled(arrays: Sequence[Array]) -> bool:
    widths = {_leaves.wide_dtype(array.dtype) for array in arrays}
    return _compat.HAS_DOUBLES and widths == {np.dtype(np.float32)}


# A barrier separates the reads for a norm from other uses of the updates. Without it, XLA would
# compute squares once for a norm and for Adam, or convert a 16-bit leaf once for a norm and for
# its scaling, and keep the result in memory. Each array has a barrier of its own, so that none
# waits for another.
def _apart(arrays: Sequence[Array]) -> list[Array]:
    return [_compat.optimization_barrier(array) for array in arrays]


def for_one_read(arrays: Sequence[Array]) -> list[Array]:
    """The arrays, so that several sums over each become one read of it."""

    def as_they_are(*arrays: Array) -> list[Array]:
        return list(arrays)

    def apart(*arrays: Array) -> list[Array]:
        return _apart(arrays)

    # A TPU sums a gradient in the kernel that makes it. A GPU does not, and joins its sums
    # only if what they read is not known to be the result of a matrix product.
    return list(jax.lax.platform_dependent(*arrays, tpu=as_they_are, default=apart))


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


def in_range(norm: Array, unit: Array) -> Array:
    """`norm * unit`, which overflows only if the exact norm does."""
    last = np.finfo(norm.dtype).max * (1 - 1e-6) / unit
    is_rounded_out = (norm > last) & (norm * (1 - 4e-6) <= last)
    return jnp.where(is_rounded_out, last, norm) * unit
