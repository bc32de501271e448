"""Products that make a leaf, where its plan does not use them."""

import math
from typing import Any

from clipax.per_example import _programs
from clipax.per_example._plans import CHEAPER, Plan, Way
from clipax.per_example._programs import is_variable
from clipax.per_example._roles import entries_of
from clipax.per_example._scopes import Origin, Scope
from clipax.per_example._terms import Product, Term, Whole
from clipax.per_example._walk import terms_of

# A walk further back than this is given up.
_MOST_VISITED = 10_000


def overlooked(plan: Plan, scope: Scope, variable: Any) -> int | None:
    """The entries of factors that a leaf does not have, if they are fewer than its own."""
    if plan.way is not Way.EACH or plan.why == CHEAPER:
        return None
    entries = 0
    pending = [scope.origin(variable)]
    seen: set[Origin] = set()
    while pending and len(seen) < _MOST_VISITED:
        origin = pending.pop()
        if origin in seen or not is_variable(origin[1]):
            continue
        seen.add(origin)
        here, atom = origin
        terms = [term for term in terms_of(here, atom) if not _is_shared(term)]
        products = [term for term in terms if isinstance(term, Product)]
        if len(products) < len(terms):
            pending += _made_from(here, atom)
        # Other products are of activations, or of an activation with another parameter.
        elif all(term.rhs.depends and term.lhs.depends for term in products):
            entries += _times_made(here) * sum(map(entries_of, products))
    return entries if 0 < entries < math.prod(plan.shape) else None


def _is_shared(term: Term) -> bool:
    return isinstance(term, Whole) and not term.depends


def _made_from(scope: Scope, atom: Any) -> list[Origin]:
    equation, position = scope.maker(atom)
    if equation is None:
        return []
    body = _programs.body_of(equation)
    if body is None:
        some = (each for each in equation.invars if scope.depends_on_example(each))
        return [scope.origin(each) for each in some]
    inside = scope.inside(equation, body)
    return [inside.origin(body.program.outvars[position])]


def _times_made(scope: Scope) -> int:
    """In how many steps of scans."""
    scans = (each for each in scope.path if not isinstance(each, int))
    return math.prod(each.params.get("length", 1) for each in scans)
