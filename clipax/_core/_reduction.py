"""The one reduction behind every norm: over layouts, stacks and shards, in one width."""

import functools
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipax._core import _leaves
from clipax._core._range import Layout as Layout
from clipax._core._range import Operation, Scales, p_norms, powers, told_apart
from clipax._core._typing import Array


class _Stack(NamedTuple):
    """Arrays that are reduced as one."""

    members: list[int]
    """Their positions among all arrays."""
    layout: Layout

    @property
    def is_one(self) -> bool:
        return len(self.members) == 1

    @property
    def axes(self) -> tuple[int, ...]:
        return self.layout.axes if self.is_one else tuple(1 + axis for axis in self.layout.axes)

    def of(self, arrays: Sequence[Array]) -> Array:
        chosen = [arrays[member] for member in self.members]
        return chosen[0] if self.is_one else jnp.stack(chosen)

    def rows(self, part: Array) -> list[Array]:
        return [part] if self.is_one else list(part)


# Alike leaves up to this many elements share one reduction: a tree of a thousand small leaves
# then compiles a few kernels, and little is copied to stack them. Norms of larger ones do not
# wait for each other, so that a gradient can be used, and freed, before the next one is made.
_LARGEST_STACKED = 2**14


# Both are jitted so that eager calls are cached, and inlined under an outer jit.
@functools.partial(jax.jit, static_argnames=("layouts", "ord"), inline=True)
def total_norm(arrays: Sequence[Array], layouts: tuple[Layout, ...], ord: float) -> Array:
    """One norm over all arrays, each over all of its axes."""
    width = _leaves.wide_dtype(*(array.dtype for array in arrays))
    stacks = _stacked_alike(arrays, layouts)

    def reduce(
        arrays: Sequence[Array], operation: Operation, power: float, scales: Scales = None
    ) -> list[Array]:
        local, _ = operation
        by_shards: dict[Any, list[Array]] = {}
        each = told_apart(scales[0], len(stacks)) if scales else [None] * len(stacks)
        for stack, scale in zip(stacks, each, strict=True):
            part = local(powers(stack.of(arrays), width, scale, power))
            by_shards.setdefault(stack.layout.shards, []).append(part)
        partial = [local(jnp.stack(parts)) for parts in by_shards.values()]
        return [local(jnp.stack(_across_shards(operation, partial, list(by_shards))))]

    return p_norms(reduce, arrays, layouts, ord, [1.0])[0]


@functools.partial(jax.jit, static_argnames=("layouts", "ord"), inline=True)
def separate_norms(
    arrays: Sequence[Array], layouts: tuple[Layout, ...], ord: float
) -> list[Array]:
    """A norm for each array: a scalar over all of its axes, else with size one at the summed."""

    def reduce_by(
        stacks: list[_Stack],
        arrays: Sequence[Array],
        operation: Operation,
        power: float,
        scales: Scales = None,
    ) -> list[Array]:
        local, _ = operation
        parts = []
        for stack in stacks:
            first = arrays[stack.members[0]]
            # Where several arrays are stacked, their scale is one.
            scale = scales[stack.members[0]] if scales else None
            of_stack = powers(stack.of(arrays), _leaves.wide_dtype(first.dtype), scale, power)
            parts.append(local(of_stack, stack.axes, keepdims=len(stack.axes) < first.ndim))
        complete = _across_shards(operation, parts, [stack.layout.shards for stack in stacks])
        # Taken apart at once: XLA computes what follows from elements of one array in one
        # kernel, but would copy results out of an array in a kernel for each.
        result: list[Any] = [None] * len(arrays)
        for stack, part in zip(stacks, complete, strict=True):
            for member, row in zip(stack.members, stack.rows(part), strict=True):
                result[member] = row
        return result

    # A GPU launches kernels for each sum, and for what follows from it. Other compilers make
    # one kernel for all that is alike, but another one for each place in a stack.
    alone = [_Stack([index], layout) for index, layout in enumerate(layouts)]
    alike = _stacked_alike(arrays, layouts)
    reduce = functools.partial(reduce_by, alone)
    reduce_stacked = functools.partial(reduce_by, alike) if len(alike) < len(alone) else None
    divisors = [layout.divisor for layout in layouts]
    return p_norms(reduce, arrays, layouts, ord, divisors, reduce_stacked)


def _stacked_alike(arrays: Sequence[Array], layouts: Sequence[Layout]) -> list[_Stack]:
    groups: dict[Any, list[int]] = {}
    for index, (array, layout) in enumerate(zip(arrays, layouts, strict=True)):
        alike = (jax.typeof(array), layout)
        groups.setdefault(alike if array.size <= _LARGEST_STACKED else index, []).append(index)
    return [_Stack(members, layouts[members[0]]) for members in groups.values()]


def _across_shards(
    operation: Operation, parts: list[Array], shards: list[tuple[Hashable, ...]]
) -> list[Array]:
    """Completes sharded parts with one collective for each set of mapped axes."""
    _, collective = operation
    complete = list(parts)
    # In the order of the leaves: every process must issue the collectives alike.
    for axes in dict.fromkeys(filter(None, shards)):
        rows = [row for row, part_axes in enumerate(shards) if part_axes == axes]
        for row, whole in zip(rows, collective([parts[row] for row in rows], axes), strict=True):
            complete[row] = whole
    return complete
