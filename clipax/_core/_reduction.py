"""The one reduction behind every norm: one over all arrays, or one for each."""

import functools
from collections.abc import Sequence

import jax

from clipax._core._range import Ways, p_norms
from clipax._core._stacks import Layout as Layout
from clipax._core._stacks import Separate, Total, one_by_one, stacked_alike
from clipax._core._typing import Array


# Both are jitted so that eager calls are cached, and inlined under an outer jit.
@functools.partial(jax.jit, static_argnames=("layouts", "ord"), inline=True)
def total_norm(arrays: Sequence[Array], layouts: tuple[Layout, ...], ord: float) -> Array:
    """One norm over all arrays, each over all of its axes."""
    total = Total(stacked_alike(arrays, layouts), ord)
    (norm,) = p_norms(Ways(total, total, _are_sharded(layouts), units=False), arrays)
    return norm


@functools.partial(jax.jit, static_argnames=("layouts", "ord", "computed"), inline=True)
def separate_norms(
    arrays: Sequence[Array], layouts: tuple[Layout, ...], ord: float, *, computed: bool = False
) -> list[Array]:
    """A norm for each array: a scalar over all of its axes, or with size one at summed axes.

    `computed` says that the arrays are computed only to be reduced.
    """
    # A GPU launches kernels for each sum and for what follows from it. Other compilers make one
    # kernel for all like sums, but another one for each place in a stack.
    alone, alike = one_by_one(layouts), stacked_alike(arrays, layouts)
    on_gpus = alike if len(alike) < len(alone) else alone
    rows = zip(arrays, layouts, strict=True)
    units = any(len(layout.axes) < array.ndim for array, layout in rows)
    ways = Ways(
        Separate(alone, ord), Separate(on_gpus, ord), _are_sharded(layouts), units, computed
    )
    return p_norms(ways, arrays)


def _are_sharded(layouts: Sequence[Layout]) -> bool:
    return any(layout.shards for layout in layouts)
