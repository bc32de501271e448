"""The role of each axis in a product, by which all products look alike.

A product is `lhs^T rhs` in three axes, once they are grouped: `shared` counts separate matrices,
`rows` come from `lhs` and `columns` from `rhs`. Its result in this form is a *block*, of which an
`Assembly` makes a gradient.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipax._core import _compat
from clipax._core._typing import Array
from clipax.per_example._terms import Axis, Move, Product


class Roles(NamedTuple):
    """The axes of a product, grouped by role."""

    shared: tuple[Axis, ...]
    """In both operands and in the result."""
    summed: tuple[Axis, ...]
    """In both operands alone."""
    rows: tuple[Axis, ...]
    """In `lhs` and in the result."""
    columns: tuple[Axis, ...]
    """In `rhs` and in the result."""
    others: tuple[Axis, ...]
    """In the result alone. They have size one."""

    @property
    def sizes(self) -> "Sizes":
        return Sizes(*(math.prod(axis.size for axis in axes) for axes in self[:4]))


class Sizes(NamedTuple):
    shared: int
    summed: int
    rows: int
    columns: int

    @property
    def result(self) -> int:
        return self.shared * self.rows * self.columns


def roles(term: Product) -> Roles:
    lhs, rhs = set(term.lhs.all_axes), set(term.rhs.all_axes)
    steps = [axis for scalar in term.scalars for axis in scalar.all_axes]
    lhs |= set(steps)
    rhs |= set(steps)
    if term.one_hot is not None:
        # Positions cannot be summed. Where only they have an axis, updates are repeated along it.
        rhs |= lhs
        lhs |= {term.one_hot}
    out = set(term.out)
    seen = dict.fromkeys([*term.lhs.all_axes, *term.rhs.all_axes, *steps])
    return Roles(
        tuple(axis for axis in term.out if axis in lhs & rhs),
        tuple(axis for axis in seen if axis in lhs & rhs and axis not in out),
        tuple(axis for axis in term.out if axis in lhs - rhs),
        tuple(axis for axis in term.out if axis in rhs - lhs),
        tuple(axis for axis in term.out if axis not in lhs | rhs),
    )


def entries_of(term: Product) -> int:
    """How many numbers the factors of a product have."""
    sizes = roles(term).sizes
    rows = 1 if term.one_hot is not None else sizes.rows
    return sizes.shared * sizes.summed * (rows + sizes.columns)


def layout(term: Product) -> Any:
    """A key that is equal for products whose factors can be joined or compared."""
    places = {axis: place for place, axis in enumerate(term.out)}
    found = roles(term)
    axes = [
        tuple(places[axis] for axis in group)
        for group in (found.shared, found.rows, found.columns)
    ]
    return (*axes, tuple(axis.size for axis in term.out), term.moves)


def turned(term: Product) -> Product:
    """The product with its operands exchanged, which is its transpose."""
    return term._replace(lhs=term.rhs, rhs=term.lhs)


class Assembly(NamedTuple):
    """How a block becomes a gradient. Two are equal if they do the same."""

    block: tuple[int, int, int]
    """The shape of the block: shared, rows, columns."""
    sizes: tuple[int, ...]
    """Those of its axes before they were grouped."""
    permutation: tuple[int, ...]
    moves: tuple[Move, ...]

    def assembled(self, block: Array) -> Array:
        """Turns a block into a gradient."""
        block = jax.lax.transpose(block.reshape(self.sizes), self.permutation)
        for move in self.moves:
            block = move(block)
        return block

    def taken_apart(self, gradient: Array) -> Array:
        """Turns a gradient into a block."""
        zeros = _compat.varying_like(jnp.zeros(self.block, gradient.dtype), gradient)
        # `assembled` only moves entries, so its transpose moves them back.
        (block,) = jax.linear_transpose(self.assembled, zeros)(gradient)
        return block

    def rest_of(self, gradient: Array, block: Array) -> Array | None:
        """The entries of a gradient that its block lacks, or None if it lacks none."""
        if block.size == gradient.size:
            return None
        # Not a difference, which would turn inf - inf into NaN.
        return jnp.where(self.assembled(block) == gradient, 0, gradient)


def assembly_of(term: Product) -> Assembly:
    found = roles(term)
    sizes = found.sizes
    axes = (*found.shared, *found.rows, *found.columns, *found.others)
    return Assembly(
        (sizes.shared, sizes.rows, sizes.columns),
        tuple(axis.size for axis in axes),
        tuple(axes.index(axis) for axis in term.out),
        term.moves,
    )
