"""The walk back through a program, from a gradient to the terms that add up to it.

At each equation a rule returns a recipe: the variables whose terms it needs, with a function that
makes new terms from those. The walk keeps the terms of every variable that it has visited, so it
visits none twice. It has a stack of its own, because a program can be longer than Python's.
"""

from typing import Any

import numpy as np

from clipax.per_example._programs import is_variable
from clipax.per_example._rules import RULES
from clipax.per_example._rules._recipes import Recipe, Site
from clipax.per_example._scopes import Origin, Scope
from clipax.per_example._terms import Passed, Terms


def terms_of(scope: Scope, variable: Any) -> Terms:
    """The terms that add up to a variable. Zero has no terms."""
    wanted = scope.origin(variable)
    recipes: dict[Origin, Recipe] = {}
    pending = [wanted]
    while pending:
        origin = pending[-1]
        if _known(origin) is not None:
            pending.pop()
            continue
        if origin not in recipes:
            recipes[origin] = _recipe(*origin)
        before = recipes[origin].origins
        unknown = [each for each in before if _known(each) is None]
        pending += unknown
        if not unknown:
            here, atom = pending.pop()
            terms = recipes.pop(origin).combine(*map(_known, before))
            here.terms[atom] = _as_it_is(here, atom) if terms is None else terms
    return _known(wanted) or ()


def _known(origin: Origin) -> Terms | None:
    scope, atom = origin
    if is_variable(atom):
        return scope.terms.get(atom)
    is_zero = np.ndim(atom.val) == 0 and atom.val == 0
    return () if is_zero else _as_it_is(scope, atom)


def _as_it_is(scope: Scope, atom: Any) -> Terms:
    equation, _ = scope.maker(atom)
    if equation is not None:
        return scope.whole(atom, equation.primitive.name)
    if scope.is_step and atom in scope.inputs:
        return (Passed(scope.inputs[atom]),)
    return scope.whole(atom, "an argument or a constant")


_NONE = Recipe((), lambda: None)


def _recipe(scope: Scope, variable: Any) -> Recipe:
    equation, position = scope.maker(variable)
    if equation is None or equation.primitive.name not in RULES:
        return _NONE
    return RULES[equation.primitive.name](Site(scope, equation, position)) or _NONE
