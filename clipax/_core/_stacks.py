"""Sums over stacks of like arrays, completed over their shards."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipax._core import _compat, _leaves
from clipax._core._alike import rows_of
from clipax._core._operations import Operation
from clipax._core._powers import powers, root
from clipax._core._typing import Array

Scales = Sequence[Any] | None
"""The factor of each array before its sum, if there is one."""


class Divisor(NamedTuple):
    """A power of a number of entries."""

    size: Any = 1
    """It can be symbolic, for a program that is exported."""
    power: int = 0

    def under(self, sums: Array) -> Array:
        # A symbolic size is a number of the program, and an integer there, whose power overflows.
        is_known = _leaves.is_known(self.size)
        size = float(self.size) if is_known else jnp.asarray(self.size, sums.dtype)
        return sums / size**self.power if self.power else sums


class Layout(NamedTuple):
    """How one array is reduced."""

    axes: tuple[int, ...]
    """The axes that are summed over."""
    shards: tuple[Hashable, ...]
    """The mapped axes over which the sum continues."""
    divisor: Divisor = Divisor()
    """What divides the sum, such as n for the square of a root mean square."""


class Stack(NamedTuple):
    """Arrays that are reduced as one."""

    members: tuple[int, ...]
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
        if self.is_one:
            return [part]
        return _rows(part)


_rows = jax.jit(rows_of)  # Sums at several scales share its trace.


class Total(NamedTuple):
    """One sum over all arrays."""

    stacks: tuple[Stack, ...]
    ord: float

    def sums(
        self, arrays: Sequence[Array], operation: Operation, power: float, scales: Scales = None
    ) -> list[Array]:
        width = _leaves.wide_dtype(*(array.dtype for array in arrays))
        by_shards: dict[Any, list[Array]] = {}
        number = len(self.stacks)
        each = repeated(scales[0], number) if scales else [None] * number
        for stack, scale in zip(self.stacks, each, strict=True):
            part = operation.local(powers(stack.of(arrays), width, scale, power))
            by_shards.setdefault(stack.layout.shards, []).append(part)
        partial = [operation.local(jnp.stack(parts)) for parts in by_shards.values()]
        complete = across_shards(operation, partial, list(by_shards))
        return [operation.local(jnp.stack(complete))]

    @property
    def divisors(self) -> list[Divisor]:
        return [Divisor()]

    def roots(self, sums: list[Array]) -> list[Array]:
        return [root(part, self.ord) for part in sums]


class Separate(NamedTuple):
    """A sum over each array: a scalar over all of its axes, or with size one at summed axes."""

    stacks: tuple[Stack, ...]
    ord: float

    def sums(
        self, arrays: Sequence[Array], operation: Operation, power: float, scales: Scales = None
    ) -> list[Array]:
        parts = []
        for stack in self.stacks:
            first = arrays[stack.members[0]]
            # All arrays in a stack have one scale.
            scale = scales[stack.members[0]] if scales else None
            of_stack = powers(stack.of(arrays), _leaves.wide_dtype(first.dtype), scale, power)
            keepdims = len(stack.axes) < first.ndim
            parts.append(operation.local(of_stack, stack.axes, keepdims=keepdims))
        shards = [stack.layout.shards for stack in self.stacks]
        return self._in_order(across_shards(operation, parts, shards))

    @property
    def divisors(self) -> list[Divisor]:
        by_member = {
            member: stack.layout.divisor for stack in self.stacks for member in stack.members
        }
        return [by_member[member] for member in sorted(by_member)]

    def roots(self, sums: list[Array]) -> list[Array]:
        rows = zip(sums, self.divisors, strict=True)
        return [root(divisor.under(part), self.ord) for part, divisor in rows]

    def _in_order(self, parts: Sequence[Array]) -> list[Array]:
        # Stacks are split at once, because XLA computes what follows from elements of one array
        # in one kernel, but would copy later results out of an array in one kernel each.
        result: list[Any] = [None] * sum(len(stack.members) for stack in self.stacks)
        for stack, part in zip(self.stacks, parts, strict=True):
            for member, row in zip(stack.members, stack.rows(part), strict=True):
                result[member] = row
        return result


Reduction = Total | Separate

# Alike leaves up to this many elements share one reduction: a tree of a thousand small leaves
# then compiles a few kernels, and little is copied to stack them. Norms of larger ones do not
# wait for each other, so that a gradient can be used, and freed, before the next one is made.
_LARGEST_STACKED = 2**14


def stacked_alike(arrays: Sequence[Array], layouts: Sequence[Layout]) -> tuple[Stack, ...]:
    groups: dict[Any, list[int]] = {}
    for index, (array, layout) in enumerate(zip(arrays, layouts, strict=True)):
        alike = (jax.typeof(array), layout)
        is_little = _leaves.has_at_most(_LARGEST_STACKED, array)
        groups.setdefault(alike if is_little else index, []).append(index)
    return tuple(Stack(tuple(members), layouts[members[0]]) for members in groups.values())


def one_by_one(layouts: Sequence[Layout]) -> tuple[Stack, ...]:
    return tuple(Stack((index,), layout) for index, layout in enumerate(layouts))


def across_shards(
    operation: Operation, parts: list[Array], shards: list[tuple[Hashable, ...]]
) -> list[Array]:
    """Completes sharded parts with one collective for each set of mapped axes."""
    complete = list(parts)
    # In the order of the leaves: every process must issue the collectives alike.
    for axes in dict.fromkeys(filter(None, shards)):
        rows = [row for row, part_axes in enumerate(shards) if part_axes == axes]
        whole = operation.across([parts[row] for row in rows], axes)
        for row, part in zip(rows, whole, strict=True):
            complete[row] = part
    return complete


def repeated(scale: Any, number: int) -> list[Any]:
    """Repeats a scale in such a way that the compiler does not see one value."""
    if isinstance(scale, float):
        return [scale] * number
    return list(_compat.optimization_barrier([scale] * number))
