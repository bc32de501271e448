"""Functions that prepare the value of one example to be an operand of a product.

They are classes because two of them must be equal if they do the same: see `_rules._sums`.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core._typing import Array


def padded(value: Array, config: Sequence[tuple[int, int, int]]) -> Array:
    """Adds zeros before, after and between the entries along each axis."""
    return jax.lax.pad(value, jnp.zeros((), value.dtype), config)


class Place(NamedTuple):
    """Turns indices into rows. An index outside becomes `size`, which is no row."""

    size: int
    is_clipped: bool

    def __call__(self, indices: Array) -> Array:
        if indices.dtype.itemsize < 4:
            indices = indices.astype(jnp.int32)  # The size need not fit a narrow integer.
        if self.is_clipped:
            return jnp.clip(indices, 0, self.size - 1)
        return jnp.where((indices >= 0) & (indices < self.size), indices, self.size)


class Places(NamedTuple):
    """Turns vectors of indices into rows of a table whose looked up axes are one.

    A vector with an index outside becomes the number of rows, which is no row.
    """

    columns: tuple[int, ...]
    """For each looked up axis, where its index is in the vectors."""
    sizes: tuple[int, ...]
    is_clipped: bool

    def __call__(self, indices: Array) -> Array:
        rows = jnp.zeros(indices.shape[:-1], jnp.int32)
        is_inside = jnp.ones(rows.shape, bool)
        for column, size in zip(self.columns, self.sizes, strict=True):
            index = Place(size, self.is_clipped)(indices[..., column])
            rows = rows * size + index.astype(jnp.int32)
            is_inside &= index < size
        return jnp.where(is_inside, rows, math.prod(self.sizes))


class Stretch(NamedTuple):
    """Counts some rows from the first."""

    size: int

    def __call__(self, first: Array) -> Array:
        return first[..., None] + jnp.arange(self.size, dtype=first.dtype)


class Ones(NamedTuple):
    """Turns each position into zeros with a one there."""

    size: int
    dtype: Any

    def __call__(self, places: Array) -> Array:
        return jax.nn.one_hot(places, self.size, dtype=self.dtype)


class Multiplied(NamedTuple):
    """Multiplies by a number, which is complex."""

    number: complex

    def __call__(self, value: Array) -> Array:
        return value * jnp.asarray(self.number, value.dtype)


class Squeezed(NamedTuple):
    """Drops an axis of size one."""

    axis: int

    def __call__(self, value: Array) -> Array:
        return jnp.squeeze(value, self.axis)


class Grouped(NamedTuple):
    """Moves the first axis of a convolution's operand to the front, split into groups."""

    spec: tuple[int, ...]
    groups: int

    def __call__(self, value: Array) -> Array:
        value = jnp.transpose(value, self.spec)
        return value.reshape(self.groups, value.shape[0] // self.groups, *value.shape[1:])


class Windows(NamedTuple):
    """Lays out the windows of a convolution.

    Entry `[n, *p, *k, ...]` is what the convolution multiplies by entry `p` to make result `k`.
    """

    spec: tuple[int, ...]
    groups: int
    results: tuple[int, ...]
    places: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    spacing: tuple[int, ...]

    def __call__(self, value: Array) -> Array:
        first, *others = self.spec
        # Channels are usually last. If they stay there, windows are contiguous in memory.
        value = jnp.transpose(value, (*others, first))
        edges = [
            (low, high, step - 1)
            for (low, high), step in zip(self.padding, self.dilation, strict=True)
        ]
        value = padded(value, [(0, 0, 0), *edges, (0, 0, 0)])
        count, *_, channels = value.shape
        grouped = (self.groups, channels // self.groups)
        windows = self._patches(value) if self.are_apart else self._slices(value)
        return windows.reshape(count, *self.places, *self.results, *grouped)

    @property
    def are_apart(self) -> bool:
        """Whether no entry is in two windows, as in a model of patches."""
        rows = zip(self.strides, self.spacing, self.results, strict=True)
        return all(stride == 1 and spacing >= size for stride, spacing, size in rows)

    def _patches(self, value: Array) -> Array:
        """Windows that are apart are a reshape."""
        count, *sizes, channels = value.shape
        wanted = [
            places * spacing for places, spacing in zip(self.places, self.spacing, strict=True)
        ]
        edges = [(0, size - old, 0) for size, old in zip(wanted, sizes, strict=True)]
        value = padded(value, [(0, 0, 0), *edges, (0, 0, 0)])
        pairs = zip(self.places, self.spacing, strict=True)
        value = value.reshape(count, *(size for pair in pairs for size in pair), channels)
        dims = len(self.places)
        order = [0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1]
        value = jnp.transpose(value, order)
        return jax.lax.slice(
            value, [0] * value.ndim, (count, *self.places, *self.results, channels)
        )

    def _slices(self, value: Array) -> Array:
        count, *_, channels = value.shape
        slices = []
        for result in np.ndindex(*self.results):
            starts = [index * stride for index, stride in zip(result, self.strides, strict=True)]
            limits = [
                start + (size - 1) * step + 1
                for start, size, step in zip(starts, self.places, self.spacing, strict=True)
            ]
            slices.append(
                jax.lax.slice(
                    value, (0, *starts, 0), (count, *limits, channels), (1, *self.spacing, 1)
                )
            )
        return jnp.stack(slices, 1 + len(self.places))


class Padded(NamedTuple):
    """Adds zeros along an axis."""

    axis: int
    edges: tuple[int, int, int]

    def __call__(self, value: Array) -> Array:
        config = [(0, 0, 0)] * value.ndim
        config[self.axis] = self.edges
        return padded(value, config)


class Sliced(NamedTuple):
    """Takes a slice along an axis."""

    axis: int
    part: tuple[int, int, int]

    def __call__(self, value: Array) -> Array:
        return jax.lax.slice_in_dim(value, *self.part, axis=self.axis)
