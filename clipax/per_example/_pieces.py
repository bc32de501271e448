"""The pieces of a gradient: boxes that do not overlap, each with the terms inside it."""

from collections.abc import Sequence
from typing import NamedTuple

from clipax.per_example._boxes import Box, everything
from clipax.per_example._placing import in_box, moved, written_out
from clipax.per_example._terms import Move, Placed, Whole


class Piece(NamedTuple):
    box: Box
    terms: tuple[Placed, ...]
    """Terms of the entries in the box alone."""


def pieces_of(terms: Sequence[Placed], shape: tuple[int, ...]) -> list[Piece]:
    """The pieces, in which every term that differs between examples has a place.

    The gradients of two pieces have no entry in common, so the squares of their norms add up.
    """
    found: list[tuple[Box, list[Placed]]] = []
    constants = constants_of(terms)
    for term in terms:
        if isinstance(term, Whole) and not term.depends:
            continue
        box, inside = term.box or everything(shape), [term]
        while touching := [each for each in found if each[0].overlaps(box)]:
            found = [each for each in found if not each[0].overlaps(box)]
            for other, others in touching:
                box, inside = box.joined(other), [*others, *inside]
        found.append((box, inside))
    return [
        Piece(box, tuple(in_box(term, box) for term in inside) + _cut_out(constants, box))
        for box, inside in found
    ]


def constants_of(terms: Sequence[Placed]) -> list[Whole]:
    """The terms that are the same for all examples."""
    return [term for term in terms if isinstance(term, Whole) and not term.depends]


def _cut_out(constants: Sequence[Placed], box: Box) -> tuple[Placed, ...]:
    """The entries of constants in a box."""
    if box.is_everything:
        return tuple(written_out(term) for term in constants)
    near = (term for term in constants if term.box is None or term.box.overlaps(box))
    part = Move("slice", (box.starts, box.limits))
    return tuple(
        term._replace(box=None) if term.box == box else moved(written_out(term), part)
        for term in near
    )
