"""Rules of primitives that move all entries to other places."""

import math

from clipax.per_example._programs import shape_of
from clipax.per_example._rules._recipes import Recipe, Site, rule, term_by_term
from clipax.per_example._terms import Axis, Move, Product


@rule("rev")
def _rev(site: Site) -> Recipe:
    move = Move("rev", (tuple(site.params["dimensions"]),))
    return term_by_term(site.origin(0), lambda term: moved(term, move))


def moved(term: Product, move: Move) -> Product:
    """Appends a move to those of a product."""
    return term._replace(moves=move.after(term.moves))


@rule("transpose")
def _transpose(site: Site) -> Recipe:
    permutation = tuple(map(int, site.params["permutation"]))

    def change(term: Product) -> Product:
        if term.moves:
            return moved(term, Move("transpose", (permutation,)))
        return term._replace(out=tuple(term.out[axis] for axis in permutation))

    return term_by_term(site.origin(0), change)


@rule("reshape")
def _reshape(site: Site) -> Recipe | None:
    is_permuted = site.params["dimensions"] is not None
    return None if is_permuted else _in_the_new_shape(site)


@rule("squeeze")
def _in_the_new_shape(site: Site) -> Recipe:
    shape = shape_of(site.variable)
    return term_by_term(site.origin(0), lambda term: _reshaped(term, shape))


def _reshaped(term: Product, shape: tuple[int, ...]) -> Product:
    longer = [axis for axis in term.out if axis.size != 1]
    if term.moves or [axis.size for axis in longer] != [size for size in shape if size != 1]:
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
