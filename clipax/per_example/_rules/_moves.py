"""Rules of primitives that move all entries to other places."""

import math

from clipax.per_example._placing import moved, written_out
from clipax.per_example._programs import shape_of
from clipax.per_example._rules._recipes import Recipe, Site, rule, term_by_term
from clipax.per_example._terms import Axis, Move, Placed, Product


@rule("rev")
def _rev(site: Site) -> Recipe:
    dimensions = tuple(site.params["dimensions"])

    def change(term: Placed) -> Placed:
        term = moved(term, Move("rev", (dimensions,)))
        return term._replace(box=term.box and term.box.reversed(dimensions))

    return term_by_term(site.origin(0), change, moves_entries=True)


@rule("transpose")
def _transpose(site: Site) -> Recipe:
    permutation = tuple(map(int, site.params["permutation"]))

    def change(term: Placed) -> Placed:
        if term.moves or not isinstance(term, Product):
            term = moved(term, Move("transpose", (permutation,)))
        else:
            term = term._replace(out=tuple(term.out[axis] for axis in permutation))
        return term._replace(box=term.box and term.box.transposed(permutation))

    return term_by_term(site.origin(0), change, moves_entries=True)


@rule("reshape")
def _reshape(site: Site) -> Recipe | None:
    is_permuted = site.params["dimensions"] is not None
    return None if is_permuted else _in_the_new_shape(site)


@rule("squeeze")
def _in_the_new_shape(site: Site) -> Recipe:
    shape = shape_of(site.variable)
    return term_by_term(site.origin(0), lambda term: reshaped(term, shape), moves_entries=True)


def reshaped(term: Placed, shape: tuple[int, ...]) -> Placed:
    """The term in another shape."""
    box = term.box and term.box.reshaped(shape)
    if box is None:
        return _reshaped(written_out(term), shape)
    return _reshaped(term, box.sizes)._replace(box=box)


def _reshaped(term: Placed, shape: tuple[int, ...]) -> Placed:
    if term.moves or not isinstance(term, Product):
        return moved(term, Move("reshape", (shape,)))
    longer = [axis for axis in term.out if axis.size != 1]
    if [axis.size for axis in longer] != [size for size in shape if size != 1]:
        return moved(term, Move("reshape", (shape,)))
    # Only axes of size one appear or disappear.
    rest = iter(longer)
    return term._replace(out=tuple(next(rest) if size != 1 else Axis(1) for size in shape))


@rule("broadcast_in_dim")
def _broadcast(site: Site) -> Recipe | None:
    before, after = shape_of(site.operands[0]), shape_of(site.variable)
    if math.prod(before) == math.prod(after):
        return _in_the_new_shape(site)
    # No term can be repeated. Zero has no terms, and stays zero.
    return term_by_term(site.origin(0), lambda _: None)
