"""Rules of primitives that cut out parts of an array, or place an array in a larger one."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from clipax.per_example._placing import Edges, cut, placed
from clipax.per_example._programs import shape_of
from clipax.per_example._rules._moves import reshaped
from clipax.per_example._rules._recipes import MOST_CHANGED, Recipe, Site, rule, term_by_term
from clipax.per_example._terms import Passed, Placed, Product, Term, Terms


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
    if any(step and part != (0, size, 1) for part, size, (_, _, step) in rows):
        return None
    is_around = all(low >= 0 and high >= 0 and not step for low, high, step in config)
    sizes = tuple(len(range(*part)) for part in cuts)

    def change(term: Placed) -> Placed | None:
        if not isinstance(term, Product):
            return placed(term, shape, edges) if is_around else None
        part = cut(term, shape, cuts)
        return part and placed(part, sizes, edges)

    def combine(terms: Terms, filling: Terms) -> Terms | None:
        return None if filling else _each(terms, change)

    return Recipe([site.origin(0), site.origin(1)], combine)


def _each(terms: Terms, change: Callable[[Any], Placed | None]) -> Terms | None:
    """Changes terms one by one, those that are taken as they are too."""
    if len(terms) > MOST_CHANGED:
        return None
    found: list[Term] = []
    for term in terms:
        new = None if isinstance(term, Passed) else change(term)
        if new is None:
            return None
        found.append(new)
    return tuple(found)


@rule("slice")
def _slice(site: Site) -> Recipe:
    params = site.params
    strides = params["strides"] or [1] * len(params["start_indices"])
    cuts = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    shape = shape_of(site.operands[0])
    return term_by_term(site.origin(0), lambda term: cut(term, shape, cuts))


@rule("split")
def _split(site: Site) -> Recipe:
    axis, sizes = site.params["axis"], site.params["sizes"]
    shape = shape_of(site.operands[0])
    start = sum(sizes[: site.position])
    cuts = [(0, size, 1) for size in shape]
    cuts[axis] = (start, start + sizes[site.position], 1)
    return term_by_term(site.origin(0), lambda term: cut(term, shape, cuts))


@rule("concatenate")
def _concatenate(site: Site) -> Recipe:
    return _joined(site, site.params["dimension"], lambda term: term)


@rule("stack")
def _stack(site: Site) -> Recipe:
    axis = site.params["axis"]
    shape = list(shape_of(site.variable))
    shape[axis] = 1
    return _joined(site, axis, lambda term: reshaped(term, tuple(shape)))


def _joined(site: Site, axis: int, change: Callable[[Any], Placed]) -> Recipe:
    """Places the operands one after the other along an axis."""
    whole = shape_of(site.variable)
    count = len(site.operands)
    is_stack = len(shape_of(site.operands[0])) < len(whole)
    sizes = [1 if is_stack else shape_of(operand)[axis] for operand in site.operands]

    def combine(*parts: Terms) -> Terms | None:
        found: list[Term] = []
        start = 0
        for terms, size in zip(parts, sizes, strict=True):
            shape = (*whole[:axis], size, *whole[axis + 1 :])
            edges = [(0, 0, 0)] * len(whole)
            edges[axis] = (start, whole[axis] - start - size, 0)
            start += size
            these = _each(terms, functools.partial(_put, change, shape, edges))
            if these is None:
                return None
            found += these
        return tuple(found)

    return Recipe([site.origin(index) for index in range(count)], combine)


def _put(
    change: Callable[[Any], Placed], shape: Sequence[int], edges: Edges, term: Placed
) -> Placed:
    return placed(change(term), shape, edges)
