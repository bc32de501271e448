"""Terms at places of larger arrays: put there, cut out, or moved."""

from collections.abc import Sequence
from typing import Any, TypeAlias

from clipax.per_example._boxes import Box, everything
from clipax.per_example._preparations import Padded, Sliced
from clipax.per_example._terms import Axis, Move, Operand, Placed, Product

Edges: TypeAlias = Sequence[tuple[int, int, int]]


def moved(term: Placed, move: Move) -> Placed:
    """Appends a move to those of a term."""
    return term._replace(moves=move.after(term.moves))


def placed(term: Placed, shape: Sequence[int], edges: Edges) -> Placed:
    """Adds zeros around a term of some shape, and between its entries."""
    if any(step for _, _, step in edges):
        return _with_zeros(written_out(term), edges)
    if not any(map(any, edges)):
        return term
    box = term.box or everything(shape)
    return term._replace(box=box.padded(edges))


def written_out(term: Placed) -> Placed:
    """Writes the zeros around a box into the term."""
    if term.box is None:
        return term
    return _with_zeros(term._replace(box=None), term.box.edges)


def in_box(term: Placed, box: Box) -> Placed:
    """A term that has no entries outside a box, as a term of its entries alone."""
    if term.box is None:
        return term
    return written_out(term._replace(box=term.box.within(box)))


def _with_zeros(term: Placed, edges: Edges) -> Placed:
    positions = [position for position, each in enumerate(edges) if any(each)]
    if not positions:
        return term
    if not isinstance(term, Product) or not _can_change(term, positions):
        return moved(term, Move("pad", tuple(edges)))
    for position in positions:
        low, high, step = edges[position]
        size = term.out[position].size
        new = Axis(low + high + size + max(0, size - 1) * step)
        term = _changed_along(term, position, new, Padded, edges[position])
    return term


def cut(
    term: Product, shape: Sequence[int], cuts: Sequence[tuple[int, int, int]]
) -> Product | None:
    """Cuts a slice out of a product of some shape by cutting its operands, or returns None."""
    rows = zip(cuts, shape, strict=True)
    positions = [index for index, (part, size) in enumerate(rows) if part != (0, size, 1)]
    if not positions:
        return term
    written = written_out(term)
    if not isinstance(written, Product) or not _can_change(written, positions):
        return None
    term = written
    for position in positions:
        part = cuts[position]
        term = _changed_along(term, position, Axis(len(range(*part))), Sliced, part)
    return term


def _can_change(term: Product, positions: Sequence[int]) -> bool:
    """Whether some axes of a product belong to operands that can be changed along them."""

    def is_of_operands(axis: Axis) -> bool:
        operands = [each for each in (term.lhs, term.rhs) if axis in each.all_axes]
        return bool(operands) and all(axis in each.axes and not each.times for each in operands)

    return not term.moves and all(is_of_operands(term.out[position]) for position in positions)


def _changed_along(term: Product, position: int, new: Axis, kind: Any, how: Any) -> Product:
    old = term.out[position]

    def change(operand: Operand) -> Operand:
        if old not in operand.axes:
            return operand
        return operand._replace(
            axes=tuple(new if axis is old else axis for axis in operand.axes),
            preparations=(*operand.preparations, kind(operand.axes.index(old), how)),
        )

    out = tuple(new if axis is old else axis for axis in term.out)
    return term._replace(lhs=change(term.lhs), rhs=change(term.rhs), out=out)
