"""Boxes: the entries of an array that a slice selects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from clipax._core._typing import Array


class Box(NamedTuple):
    """Some entries of an array: on each axis, `size` of them from `start` on."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    shape: tuple[int, ...]
    """The shape of the array."""

    @property
    def limits(self) -> tuple[int, ...]:
        return tuple(start + size for start, size in zip(self.starts, self.sizes, strict=True))

    @property
    def is_everything(self) -> bool:
        return self.sizes == self.shape

    @property
    def edges(self) -> list[tuple[int, int, int]]:
        """What `jax.lax.pad` adds to the entries to make the array."""
        rows = zip(self.starts, self.limits, self.shape, strict=True)
        return [(start, size - limit, 0) for start, limit, size in rows]

    def overlaps(self, other: Box) -> bool:
        pairs = zip(self.starts, self.limits, other.starts, other.limits, strict=True)
        return all(one < its_end and its < end for one, end, its, its_end in pairs)

    def joined(self, other: Box) -> Box:
        """The smallest box around two."""
        starts = tuple(map(min, self.starts, other.starts))
        limits = map(max, self.limits, other.limits)
        sizes = tuple(limit - start for start, limit in zip(starts, limits, strict=True))
        return Box(starts, sizes, self.shape)

    def within(self, other: Box) -> Box:
        """The same entries, as entries of what a larger box selects."""
        starts = (start - its for start, its in zip(self.starts, other.starts, strict=True))
        return Box(tuple(starts), self.sizes, other.sizes)

    def padded(self, edges: Sequence[tuple[int, int, int]]) -> Box:
        """The same entries, in an array to whose ends zeros are added."""
        starts = (start + low for start, (low, _, _) in zip(self.starts, edges, strict=True))
        shape = (low + size + high for size, (low, high, _) in zip(self.shape, edges, strict=True))
        return Box(tuple(starts), self.sizes, tuple(shape))

    def stacked(self, size: int) -> Box:
        """The same entries of all arrays in a stack."""
        return Box((0, *self.starts), (size, *self.sizes), (size, *self.shape))

    def transposed(self, permutation: Sequence[int]) -> Box:
        return Box(*(tuple(each[axis] for axis in permutation) for each in self))

    def reversed(self, dimensions: Sequence[int]) -> Box:
        rows = enumerate(zip(self.starts, self.limits, self.shape, strict=True))
        starts = (
            size - limit if axis in dimensions else start for axis, (start, limit, size) in rows
        )
        return self._replace(starts=tuple(starts))

    def without(self, dimensions: Sequence[int]) -> Box:
        """Drops axes."""
        kept = [axis for axis in range(len(self.shape)) if axis not in dimensions]
        return self.transposed(kept)

    def reshaped(self, shape: Sequence[int]) -> Box | None:
        """The same entries after a reshape of the array; None if they are no box there."""
        found = []
        for old, new in _groups(self.shape, shape):
            part = _reshaped(Box(*(each[old] for each in self)), tuple(shape[new]))
            if part is None:
                return None
            found.append(part)
        starts = tuple(start for part in found for start in part.starts)
        sizes = tuple(size for part in found for size in part.sizes)
        return Box(starts, sizes, tuple(shape))

    def replaced(self, array: Array, entries: Array) -> Array:
        """The array with other entries in this box."""
        return jax.lax.dynamic_update_slice(array, entries, self.starts)


def everything(shape: Sequence[int]) -> Box:
    return Box((0,) * len(shape), tuple(shape), tuple(shape))


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[slice, slice]]:
    """Cuts two shapes of one array into the shortest pieces that have as many entries."""
    found = []
    first, other_first = 0, 0
    while first < len(old) or other_first < len(new):
        last, other_last = first, other_first
        size, other_size = 1, 1
        while True:
            if last < len(old) and (size <= other_size or other_last == len(new)):
                size *= old[last]
                last += 1
            else:
                other_size *= new[other_last]
                other_last += 1
            is_at_the_end = last == len(old) and other_last == len(new)
            if is_at_the_end or (size == other_size and size != 1):
                break
        found.append((slice(first, last), slice(other_first, other_last)))
        first, other_first = last, other_last
    return found


def _reshaped(box: Box, shape: tuple[int, ...]) -> Box | None:
    """`Box.reshaped` of axes that are reshaped together."""
    if box.is_everything:
        return everything(shape)
    if 0 in box.sizes:
        return None
    # The entries are a stretch if all axes after the first with several of them are whole.
    several = [axis for axis, size in enumerate(box.sizes) if size != 1]
    first = several[0] if several else len(box.sizes)
    if box.sizes[first + 1 :] != box.shape[first + 1 :]:
        return None
    start = 0
    for place, size in zip(box.starts, box.shape, strict=True):
        start = start * size + place
    return _stretch(start, math.prod(box.sizes), shape)


def _stretch(start: int, length: int, shape: tuple[int, ...]) -> Box | None:
    """A stretch of the entries of an array in their order; None if they are no box."""
    for axis, size in enumerate(shape):
        step = math.prod(shape[axis + 1 :])
        first = start // step
        is_in_one = first % size + length // step <= size
        if start % step == length % step == 0 and length >= step and is_in_one:
            starts = [start // math.prod(shape[each + 1 :]) % shape[each] for each in range(axis)]
            return Box(
                (*starts, first % size, *[0] * (len(shape) - axis - 1)),
                (*[1] * axis, length // step, *shape[axis + 1 :]),
                shape,
            )
    return None
