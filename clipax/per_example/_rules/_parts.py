"""Rules of primitives that cut out parts of an array, or place an array in a larger one."""

import functools
from collections.abc import Sequence
from typing import Any

from clipax.per_example._preparations import Padded, Sliced
from clipax.per_example._programs import shape_of
from clipax.per_example._rules._moves import moved
from clipax.per_example._rules._recipes import Recipe, Site, changed, rule, term_by_term
from clipax.per_example._terms import Axis, Move, Operand, Product, Term, Terms


@rule("pad")
def _pad(site: Site) -> Recipe | None:
    config = [tuple(map(int, edges)) for edges in site.params["padding_config"]]
    shape = shape_of(site.operands[0])
    cuts = [
        (max(-low, 0), size - max(-high, 0), 1)
        for (low, high, _), size in zip(config, shape, strict=True)
    ]
    edges = [(max(low, 0), max(high, 0), step) for low, high, step in config]
    rows = zip(cuts, shape, edges, strict=True)
    if any(step and cut != (0, size, 1) for cut, size, (_, _, step) in rows):
        return None

    def change(term: Product) -> Product | None:
        cut = _cut(term, cuts, shape)
        return None if cut is None else _padded(cut, edges)

    def combine(terms: Terms, filling: Terms) -> Terms | None:
        return None if filling else changed(terms, change)

    return Recipe([site.origin(0), site.origin(1)], combine)


def _padded(term: Product, edges: Sequence[tuple[int, ...]]) -> Product:
    positions = [position for position, each in enumerate(edges) if any(each)]
    can_pad_operands = not term.moves and all(
        _is_of_operands(term, position) for position in positions
    )
    if not can_pad_operands:
        return moved(term, Move("pad", tuple(edges)))
    for position in positions:
        low, high, step = edges[position]
        size = term.out[position].size
        new = Axis(low + high + size + max(0, size - 1) * step)
        term = _changed_along(term, position, new, Padded, edges[position])
    return term


@rule("slice")
def _slice(site: Site) -> Recipe:
    params = site.params
    strides = params["strides"] or [1] * len(params["start_indices"])
    cuts = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    shape = shape_of(site.operands[0])
    return term_by_term(site.origin(0), lambda term: _cut(term, cuts, shape))


@rule("split")
def _split(site: Site) -> Recipe:
    axis, sizes = site.params["axis"], site.params["sizes"]
    shape = shape_of(site.operands[0])
    start = sum(sizes[: site.position])
    cuts = [(0, size, 1) for size in shape]
    cuts[axis] = (start, start + sizes[site.position], 1)
    return term_by_term(site.origin(0), lambda term: _cut(term, cuts, shape))


@rule("concatenate")
def _concatenate(site: Site) -> Recipe:
    axis = site.params["dimension"]
    sizes = [shape_of(operand)[axis] for operand in site.operands]

    def combine(*parts: Terms) -> Terms | None:
        found: list[Term] = []
        start = 0
        for terms, size in zip(parts, sizes, strict=True):
            edges = [(0, 0, 0)] * len(shape_of(site.variable))
            edges[axis] = (start, sum(sizes) - start - size, 0)
            start += size
            padded = changed(terms, functools.partial(_padded, edges=edges))
            if padded is None:
                return None
            found += padded
        return tuple(found)

    return Recipe([site.origin(index) for index in range(len(sizes))], combine)


def _cut(
    term: Product, cuts: Sequence[tuple[int, int, int]], shape: tuple[int, ...]
) -> Product | None:
    """Cuts a part out of a product by cutting its operands."""
    for position, (cut, size) in enumerate(zip(cuts, shape, strict=True)):
        if cut == (0, size, 1):
            continue
        if term.moves or not _is_of_operands(term, position):
            return None
        term = _changed_along(term, position, Axis(len(range(*cut))), Sliced, cut)
    return term


def _is_of_operands(term: Product, position: int) -> bool:
    """Whether an axis of a product belongs to operands that can be changed along it."""
    axis = term.out[position]
    operands = [each for each in (term.lhs, term.rhs) if axis in each.all_axes]
    return bool(operands) and all(axis in each.axes for each in operands)


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
