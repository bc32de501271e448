"""The rule of branches, of which an example chooses one."""

import jax.numpy as jnp

from clipax.per_example import _programs
from clipax.per_example._programs import is_variable
from clipax.per_example._rules._recipes import Recipe, Site, rule
from clipax.per_example._rules._sums import total
from clipax.per_example._terms import Product, Term, Terms, Whole


@rule("cond")
def _cond(site: Site) -> Recipe:
    """Adds up the terms of all branches: those of a branch that is not chosen are zero."""
    places = []
    for number, body in enumerate(_programs.branches_of(site.equation)):
        inside = site.scope.branch(site.equation, number, body)
        places.append(inside.origin(body.program.outvars[site.position]))

    def combine(*found: Terms) -> Terms | None:
        is_right = places and all(_is_zero_by_zeros(term) for terms in found for term in terms)
        return total(site, [(terms, 1.0) for terms in found]) if is_right else None

    return Recipe(places, combine)


def _is_zero_by_zeros(term: Term) -> bool:
    """Whether a term is zero if all values of the branch are."""
    if isinstance(term, Whole):
        return is_variable(term.ref.variable)
    return isinstance(term, Product) and all(
        is_variable(operand.ref.variable) and jnp.reciprocal not in operand.preparations
        for operand in term.operands
    )
