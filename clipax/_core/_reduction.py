"""The one reduction behind every norm: one over all arrays, or one for each."""

import functools
from collections.abc import Sequence

import jax

from clipax._core import _leaves, _range
from clipax._core._range import Ways
from clipax._core._stacks import Divisor as Divisor
from clipax._core._stacks import Layout as Layout
from clipax._core._stacks import Separate, Total, one_by_one, stacked_alike
from clipax._core._typing import Array

# A CPU sums this many squares as fast in float64, and compiles it in half of the time.
_LARGEST_DOUBLED = 2**14


# All three are jitted so that eager calls are cached. These two are inlined under an outer jit.
@functools.partial(jax.jit, static_argnames=("layouts", "ord"), inline=True)
def total_norm(arrays: Sequence[Array], layouts: tuple[Layout, ...], ord: float) -> Array:
    """One norm over all arrays, each over all of its axes."""
    total = Total(stacked_alike(arrays, layouts), ord)
    ways = Ways(total, _are_sharded(layouts), units=False)
    (norm,) = _range.p_norms(ways, arrays)
    return norm


@functools.partial(jax.jit, static_argnames=("layouts", "ord"), inline=True)
def separate_norms(
    arrays: Sequence[Array], layouts: tuple[Layout, ...], ord: float
) -> list[Array]:
    """A norm for each array: a scalar over all of its axes, or with size one at summed axes."""
    if _are_sharded(layouts):
        # They share collectives.
        together = Separate(one_by_one(layouts), ord)
        return _range.p_norms(Ways(together, shards=True, units=False), arrays)

    def each_alone(arrays: Sequence[Array]) -> list[Array]:
        rows = zip(arrays, layouts, strict=True)
        return [_norm_alone(array, layout, ord) for array, layout in rows]

    stacks = stacked_alike(arrays, layouts)
    if len(stacks) == len(layouts) or ord not in (2, float("inf")):
        return each_alone(arrays)
    # A GPU launches kernels for each sum and for what follows from it. Other compilers make one
    # kernel for all like sums, but another one for each place in a stack.
    rows = zip(arrays, layouts, strict=True)
    units = any(len(layout.axes) < array.ndim for array, layout in rows)
    stacked = Ways(Separate(stacks, ord), shards=False, units=units)
    on_gpus = functools.partial(_range.norms_on_gpus, stacked)
    return _range.by_platform(arrays, default=each_alone, cpu=None, gpu=on_gpus)


# A call costs a small part of its trace, which alike arrays share.
@functools.partial(jax.jit, static_argnames=("layout", "ord"))
def _norm_alone(array: Array, layout: Layout, ord: float) -> Array:
    alone = Separate(one_by_one((layout,)), ord)
    units = len(layout.axes) < array.ndim
    little = _leaves.has_at_most(_LARGEST_DOUBLED, array)
    (norm,) = _range.p_norms(Ways(alone, False, units, little), [array])
    return norm


def _are_sharded(layouts: Sequence[Layout]) -> bool:
    return any(layout.shards for layout in layouts)
