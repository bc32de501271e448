"""The terms that add up to a gradient.

A walk describes each gradient as a sum of terms. Most are products, `lhs^T rhs`, whose norms
can be found without the gradient. Operands name values of the program, which nobody has
evaluated yet.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax

from clipax._core._typing import Array
from clipax.per_example._boxes import Box
from clipax.per_example._preparations import padded
from clipax.per_example._programs import Ref


class Axis:
    """An axis of an operand. Two operands that share it are multiplied along it."""

    def __init__(self, size: int):
        self.size = size


class Operand(NamedTuple):
    """One side of a product: a value of the program after some preparations."""

    ref: Ref
    depends: bool
    """Whether the value differs between examples."""
    stacked: tuple[Axis, ...]
    """The leading axes, one for each scan that encloses the value."""
    axes: tuple[Axis, ...]
    """The other axes, after the preparations."""
    preparations: tuple[Callable[[Array], Array], ...] = ()
    """Functions of the value without its stacked axes, in order."""
    times: tuple["Times", ...] = ()
    """What the prepared value is multiplied by, in order. The last one makes the axes."""

    @property
    def all_axes(self) -> tuple[Axis, ...]:
        return self.stacked + self.axes

    def prepared(self, value: Array) -> Array:
        for preparation in self.preparations:
            value = mapped(preparation, len(self.stacked))(value)
        return value


class Times(NamedTuple):
    """A factor of an operand, multiplied along the axes that both have."""

    axes: tuple[Axis, ...]
    """The axes of the value before."""
    by: Operand


class Product(NamedTuple):
    """`lhs * rhs`, summed over the axes that are not in `out`, whose entries are then moved."""

    lhs: Operand
    rhs: Operand
    out: tuple[Axis, ...]
    moves: tuple["Move", ...] = ()
    """They keep all entries, and so the norm."""
    one_hot: Axis | None = None
    """If given, `lhs` has integers: each is the position of a one among zeros on this axis."""
    distinct: Axis | None = None
    """If given, the ones along this axis of `lhs` are in different rows."""
    scale: float = 1.0
    scalars: tuple[Operand, ...] = ()
    """Numbers that also multiply it: one for all steps of a scan, or one for each step."""
    precision: Any = None
    box: Box | None = None
    """If given, these are only the entries in a box of the gradient, whose others are zero."""

    @property
    def operands(self) -> list[Operand]:
        """All operands, with those inside others."""
        found = [self.lhs, self.rhs, *self.scalars]
        for each in found:
            # The list grows while it is read.
            found += [factor.by for factor in each.times]
        return found


class Whole(NamedTuple):
    """A value of the program that is taken as it is, because of `why`."""

    ref: Ref
    depends: bool
    why: str
    moves: tuple["Move", ...] = ()
    box: Box | None = None
    """As of a product."""


class Passed(NamedTuple):
    """In the body of a scan: the input at a position, unchanged."""

    position: int


Placed: TypeAlias = Product | Whole
Term: TypeAlias = Placed | Passed
Terms: TypeAlias = tuple[Term, ...]


class Move(NamedTuple):
    """A function that moves entries. Two moves are equal if they do the same."""

    name: str
    arguments: Any

    def __call__(self, value: Array) -> Array:
        if self.name == "mapped":
            return jax.vmap(self.arguments)(value)
        if self.name == "pad":
            return padded(value, self.arguments)
        return getattr(jax.lax, self.name)(value, *self.arguments)

    def after(self, moves: tuple["Move", ...]) -> tuple["Move", ...]:
        """Appends this move to others. It merges with the last one if both are of one kind."""
        if not moves or moves[-1].name != self.name:
            return (*moves, self)
        (*before, last) = moves
        if self.name == "reshape":
            return (*before, self)
        if self.name == "rev":
            (dimensions,), (others,) = self.arguments, last.arguments
            both = tuple(sorted({*dimensions} ^ {*others}))
            return (*before, Move("rev", (both,))) if both else tuple(before)
        if self.name == "transpose":
            (permutation,), (first,) = self.arguments, last.arguments
            both = tuple(first[axis] for axis in permutation)
            is_nothing = both == tuple(range(len(both)))
            return tuple(before) if is_nothing else (*before, Move("transpose", (both,)))
        return (*moves, self)


def mapped(function: Callable[[Array], Array], times: int) -> Callable[[Array], Array]:
    """Maps the function over some leading axes."""
    for _ in range(times):
        function = jax.vmap(function)
    return function
