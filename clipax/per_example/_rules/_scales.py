"""Rules of primitives that scale entries, or change their type."""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from clipax.per_example._preparations import Multiplied
from clipax.per_example._programs import is_variable, shape_of
from clipax.per_example._rules._complex import real_part
from clipax.per_example._rules._products import has_small_factors, multiplied
from clipax.per_example._rules._recipes import Recipe, Site, changed, rule, term_by_term
from clipax.per_example._scopes import Origin
from clipax.per_example._terms import Axis, Product, Terms

_Scaling: TypeAlias = Callable[[Terms], Terms | None]


@rule("mul")
def _mul(site: Site) -> Recipe:
    pairs = [(site.origin(index), _scaling(site, 1 - index)) for index in (0, 1)]
    scaled = [(place, scaling) for place, scaling in pairs if scaling is not None]

    def combine(*found: Terms) -> Terms | None:
        rows = zip(found, scaled, strict=True)
        products = (scaling(terms) for terms, (_, scaling) in rows)
        return next((terms for terms in products if terms is not None), None)

    return Recipe([place for place, _ in scaled], combine)


@rule("div")
def _div(site: Site) -> Recipe | None:
    scaling = _scaling(site, 1, jnp.reciprocal)
    return None if scaling is None else Recipe([site.origin(0)], scaling)


def _scaling(site: Site, index: int, *preparations: Any) -> _Scaling | None:
    """What multiplies terms by an operand: a number, or a vector along one axis."""
    if shape_of(site.operands[1 - index]) != shape_of(site.variable):
        return None  # No term can be repeated.
    number = site.scope.number(site.operands[index])
    if number is not None:
        return lambda terms: _scaled(terms, number, *preparations)
    vector = site.scope.vector(site.operands[index])
    return None if vector is None else lambda terms: _along(terms, *vector, *preparations)


def _scaled(terms: Terms, number: Origin, *preparations: Any) -> Terms | None:
    """Multiplies terms by a number."""
    scale = _constant(number[1], *preparations)
    if isinstance(scale, complex):
        return changed(terms, lambda term: _times_complex(term, scale))
    if scale is not None:
        return changed(terms, lambda term: term._replace(scale=term.scale * scale))
    if not terms:
        # The number may be infinite, and zero times infinity is not zero.
        return None
    scope, atom = number
    scalar = scope.operand(atom, (), *preparations)
    return changed(terms, lambda term: term._replace(scalars=(*term.scalars, scalar)))


def _constant(atom: Any, *preparations: Any) -> float | complex | None:
    """The value of a number, or of its reciprocal, if it is a literal of the program."""
    if is_variable(atom) or not jnp.issubdtype(atom.aval.dtype, np.inexact):
        return None
    value = complex(atom.val)
    number = value if value.imag else value.real
    if not np.isfinite(number):
        return None
    if not preparations:
        return number
    return 1 / number if number else None


def _times_complex(term: Product, number: complex) -> Product:
    preparation: Any = Multiplied(number)
    rhs = term.rhs._replace(preparations=(*term.rhs.preparations, preparation))
    return term._replace(rhs=rhs)


def _along(terms: Terms, vector: Origin, axis: int, *preparations: Any) -> Terms | None:
    """Multiplies terms by a vector along an axis."""
    if not terms:
        return None
    scope, atom = vector

    def change(term: Product) -> Product | None:
        if term.moves or term.box is not None or not (term.lhs.depends and term.rhs.depends):
            return None
        own = term.out[axis]
        if term.one_hot is None and not has_small_factors(term):
            return None
        names = [own if size != 1 else Axis(1) for size in shape_of(atom)]
        factor = scope.operand(atom, names, *preparations)

        if own in term.rhs.axes:
            return term._replace(rhs=multiplied(term.rhs, factor, term.rhs.axes))
        if own in term.lhs.axes and term.one_hot is None:
            return term._replace(lhs=multiplied(term.lhs, factor, term.lhs.axes))
        return None

    return changed(terms, change)


@rule("neg")
def _neg(site: Site) -> Recipe:
    return term_by_term(site.origin(0), lambda term: term._replace(scale=-term.scale))


@rule("convert_element_type")
def _cast(site: Site) -> Recipe | None:
    before, after = site.operands[0].aval.dtype, site.params["new_dtype"]
    was_complex, is_complex = (
        jnp.issubdtype(dtype, np.complexfloating) for dtype in (before, after)
    )
    if was_complex and not is_complex:
        return real_part(site)
    # The operands of complex products are complex.
    if was_complex != is_complex or not jnp.issubdtype(after, np.inexact):
        return None
    # A norm is taken before rounding, and the sum is cast at the end.
    return term_by_term(site.origin(0), lambda term: term, moves_entries=True)
