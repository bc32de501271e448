"""Rules of primitives that scale entries, or change their type."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from clipax.per_example._programs import is_variable
from clipax.per_example._rules._recipes import Recipe, Site, changed, rule, term_by_term
from clipax.per_example._scopes import Origin
from clipax.per_example._terms import Terms


@rule("mul")
def _mul(site: Site) -> Recipe | None:
    pairs = [(site.origin(index), site.scope.number(site.operands[1 - index])) for index in (0, 1)]
    scaled = [(place, number) for place, number in pairs if number is not None]

    def combine(*found: Terms) -> Terms | None:
        products = (
            _scaled(terms, number) for terms, (_, number) in zip(found, scaled, strict=True)
        )
        return next((terms for terms in products if terms is not None), None)

    return Recipe([place for place, _ in scaled], combine)


@rule("div")
def _div(site: Site) -> Recipe | None:
    number = site.scope.number(site.operands[1])
    if number is None:
        return None
    return Recipe([site.origin(0)], lambda terms: _scaled(terms, number, jnp.reciprocal))


def _scaled(terms: Terms, number: Origin, *preparations: Any) -> Terms | None:
    """Multiplies terms by a number."""
    scale = _constant(number[1], *preparations)
    if scale is not None:
        return changed(terms, lambda term: term._replace(scale=term.scale * scale))
    if not terms:
        # The number may be infinite, and zero times infinity is not zero.
        return None
    scope, atom = number
    scalar = scope.operand(atom, (), *preparations)
    return changed(terms, lambda term: term._replace(scalars=(*term.scalars, scalar)))


def _constant(atom: Any, *preparations: Any) -> float | None:
    """The value of a number, or of its reciprocal, if it is a literal of the program."""
    is_real = jnp.issubdtype(atom.aval.dtype, np.floating)
    if is_variable(atom) or not is_real or not np.isfinite(value := float(atom.val)):
        return None
    if not preparations:
        return value
    return 1 / value if value else None


@rule("neg")
def _neg(site: Site) -> Recipe:
    return term_by_term(site.origin(0), lambda term: term._replace(scale=-term.scale))


@rule("convert_element_type")
def _cast(site: Site) -> Recipe | None:
    # A norm is taken before rounding, and the sum is cast at the end.
    is_float = jnp.issubdtype(site.params["new_dtype"], np.floating)
    return (
        term_by_term(site.origin(0), lambda term: term, moves_entries=True) if is_float else None
    )
