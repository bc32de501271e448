"""Rules of primitives that add rows to a table, as the transposes of look-ups do.

They are products too: of updates with the rows of a matrix of zeros and ones.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from clipax._core import _leaves
from clipax.per_example._preparations import Ones, Place, Places, Squeezed, Stretch
from clipax.per_example._programs import shape_of
from clipax.per_example._rules._products import axes_of, multiplied, product
from clipax.per_example._rules._recipes import Recipe, Site, rule
from clipax.per_example._rules._sums import total
from clipax.per_example._terms import Axis, Move, Operand


class _Table(NamedTuple):
    """What a scatter does with each axis of its operand."""

    looked_up: tuple[int, ...]
    """The axes whose places are given."""
    columns: tuple[int, ...]
    """For each of them, where the index vectors have its places."""
    window: dict[int, int]
    """The axes that are updated whole, with those of the updates."""
    dropped: tuple[int, ...]
    """The axes of size one of the updates that belong to looked up axes."""


@rule("scatter-add", "scatter_add")
def _scatter_add(site: Site) -> Recipe | None:
    operand, indices, updates = site.operands
    mode = jax.lax.GatherScatterMode.from_any(site.params["mode"])
    is_clipped = mode == jax.lax.GatherScatterMode.CLIP
    table = _table(site, is_clipped or mode == jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    out = axes_of(operand)
    sizes = tuple(out[axis].size for axis in (table.looked_up if table else ()))
    if table is None or math.prod(sizes) > np.iinfo(np.int32).max:
        return None
    numbers = site.params["dimension_numbers"]
    index_axes = axes_of(indices)[:-1]
    batching = numbers.scatter_indices_batching_dims
    for index, axis in zip(batching, numbers.operand_batching_dims, strict=True):
        index_axes[index] = out[axis]
    by_window = {position: out[axis] for axis, position in table.window.items()}
    rest = iter(index_axes)
    update_axes = [
        by_window[position] if position in by_window else next(rest)
        for position in range(len(shape_of(updates)))
        if position not in table.dropped
    ]
    row, *others = table.looked_up
    place = out[row] if not others else Axis(math.prod(sizes))
    rows = site.scope.operand(indices, index_axes, Places(table.columns, sizes, is_clipped))
    squeezed = [Squeezed(axis) for axis in sorted(table.dropped, reverse=True)]
    values = site.scope.operand(updates, update_axes, *squeezed)
    beside = [axis for axis in range(len(out)) if axis not in table.looked_up]
    if others:
        order = [*table.looked_up, *beside]
        shape = tuple(out[axis].size for axis in order)
        moves: tuple[Move, ...] = (Move("reshape", (shape,)),)
        back = tuple(int(axis) for axis in np.argsort(order))
        moves = Move("transpose", (back,)).after(moves)
        axes = [place, *(out[axis] for axis in beside)]
        new = product(site, rows, values, axes, one_hot=place, moves=moves)
    else:
        new = product(site, rows, values, out, one_hot=place)
    if new is None:
        return None
    return Recipe([site.origin(0)], lambda terms: total(site, [(terms, 1.0), (new, 1.0)]))


def _table(site: Site, is_inside: bool) -> _Table | None:
    """The roles of a scatter's axes, or None for a scatter that no look-up of rows has."""
    operand, _, updates = map(shape_of, site.operands)
    numbers = site.params["dimension_numbers"]
    places = numbers.scatter_dims_to_operand_dims
    windows = iter(numbers.update_window_dims)
    looked_up, window, dropped = [], {}, []
    for axis, size in enumerate(operand):
        if axis in numbers.operand_batching_dims:
            continue
        if axis in numbers.inserted_window_dims:
            looked_up.append(axis)
            continue
        position = next(windows)
        # A window as large as the table, and inside it, starts at its first entry.
        if updates[position] == size and (is_inside or axis not in places):
            window[axis] = position
        elif updates[position] == 1:
            looked_up.append(axis)
            dropped.append(position)
        else:
            return None
    if not looked_up or not set(looked_up) <= set(places):
        return None
    columns = tuple(places.index(axis) for axis in looked_up)
    return _Table(tuple(looked_up), columns, window, tuple(dropped))


@rule("dynamic_update_slice")
def _dynamic_update_slice(site: Site) -> Recipe | None:
    """The transpose of a look-up of a block, from a place that is not known yet."""
    operand, update, *starts = site.operands
    out, update_axes = axes_of(operand), axes_of(update)
    smaller = [index for index, axis in enumerate(out) if update_axes[index].size != axis.size]
    if not smaller or not (len(smaller) == 1 or all(_leaves.is_known(axis.size) for axis in out)):
        return None

    def places(index: int, axes: Sequence[Axis], *preparations: Any) -> Operand:
        size = update_axes[index].size
        first = Place(out[index].size - size + 1, is_clipped=True)
        return site.scope.operand(starts[index], axes, first, Stretch(size), *preparations)

    # The rows are along the longest axis. Along the others, the update is moved to its place.
    row = max(smaller, key=lambda index: out[index].size)
    axes = [update_axes[index] if index in smaller else axis for index, axis in enumerate(out)]
    moving: Operand | None = None
    for index in smaller:
        if index != row:
            pair = update_axes[index], out[index]
            ones = places(index, pair, Ones(out[index].size, update.aval.dtype))
            moving = ones if moving is None else multiplied(ones, moving, (*pair, *moving.axes))
    values = site.scope.operand(update, axes)
    if moving is not None:
        after = [axes[row] if index == row else axis for index, axis in enumerate(out)]
        values = multiplied(values, moving, after)
    rows = axes[row]
    new = product(site, places(row, [rows]), values, out, one_hot=out[row], distinct=rows)
    # The rows replace other entries. That is a sum only if those are zero.
    return Recipe([site.origin(0)], lambda terms: None if terms else new)
