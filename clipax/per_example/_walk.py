"""Finds the terms that add up to a variable, in one walk over its program.

A rule reads one equation and returns a recipe: the variables whose terms it needs, and how to
make new terms from those. The walk keeps the terms of every variable that it has visited, so it
visits none twice. It keeps its own stack, because a program can be longer than Python's.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from clipax.per_example._programs import Equation, is_variable
from clipax.per_example._terms import (
    Axis,
    Operand,
    Origin,
    Passed,
    Product,
    Scope,
    Term,
    Terms,
    Whole,
)

# A sum of more terms than this is taken as it is when an equation scales or moves it. Terms
# could otherwise double with each equation, as in a chain of `w = w + move(w)`.
_MOST_CHANGED = 1024


class Site(NamedTuple):
    """One output of an equation, and the scope of the equation."""

    scope: Scope
    equation: Equation
    position: int

    @property
    def params(self) -> dict[str, Any]:
        params: dict[str, Any] = self.equation.params
        return params

    @property
    def operands(self) -> list[Any]:
        operands: list[Any] = self.equation.invars
        return operands

    @property
    def variable(self) -> Any:
        return self.equation.outvars[self.position]

    def origin(self, index: int) -> Origin:
        """Returns the origin of one operand."""
        return self.scope.origin(self.equation.invars[index])


class Recipe(NamedTuple):
    """How to make the terms of a variable from the terms of others."""

    origins: Sequence[Origin]
    """The others."""
    combine: Callable[..., Terms | None]
    """Takes their terms, in order. Returns None if the variable has to be taken as it is."""


Rule = Callable[[Site], Recipe | None]
_RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Registers a rule for some primitives. It returns None for an equation it cannot read."""

    def enter(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(primitives, function))
        return function

    return enter


def terms_of(scope: Scope, variable: Any) -> Terms:
    """Returns the terms that add up to a variable. Zero has no terms."""
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


def _recipe(scope: Scope, variable: Any) -> Recipe:
    equation, position = scope.maker(variable)
    if equation is None or equation.primitive.name not in _RULES:
        return _NONE
    return _RULES[equation.primitive.name](Site(scope, equation, position)) or _NONE


_NONE = Recipe((), lambda: None)


# -- Recipes -------------------------------------------------------------------------------------


def made(terms: Terms | None) -> Recipe | None:
    """Returns the recipe of terms that need no others."""
    return None if terms is None else Recipe((), lambda: terms)


def each(origin: Origin, change: Callable[[Product], Product | None]) -> Recipe:
    """Returns a recipe that changes each term of one other variable."""
    return Recipe([origin], lambda terms: changed(terms, change))


def changed(terms: Terms, change: Callable[[Product], Product | None]) -> Terms | None:
    """Changes terms one by one. Returns None if one of them cannot be changed."""
    if len(terms) > _MOST_CHANGED:
        return None
    found = []
    for term in terms:
        new = change(term) if isinstance(term, Product) else None
        if new is None:
            return None
        found.append(new)
    return tuple(found)


# -- Sums ----------------------------------------------------------------------------------------


@rule("add", "add_any")
def _add(site: Site) -> Recipe:
    times = _summands((site.scope, site.variable))

    def combine(*terms: Terms) -> Terms:
        return total(site, zip(terms, times.values(), strict=True))

    return Recipe(list(times), combine)


def _summands(origin: Origin) -> dict[Origin, float]:
    """Returns the operands of a sum of sums, with the number of times that each is added."""
    order: list[Origin] = []
    seen: set[Origin] = set()
    pending = [(origin, False)]
    while pending:
        here, is_after_its_parts = pending.pop()
        if is_after_its_parts:
            order.append(here)
        elif here not in seen:
            seen.add(here)
            pending.append((here, True))
            pending += [(part, False) for part in _parts(here)]
    # Floats, because a sum that is doubled a thousand times overflows to infinity.
    times = dict.fromkeys(order, 0.0) | {origin: 1.0}
    for here in reversed(order):
        for part in _parts(here):
            times[part] += times[here]
    return {here: times[here] for here in order if not _parts(here)}


def _parts(origin: Origin) -> list[Origin]:
    scope, atom = origin
    equation, _ = scope.maker(atom)
    if equation is None or equation.primitive.name not in ("add", "add_any"):
        return []
    return [scope.origin(operand) for operand in equation.invars]


def total(site: Site, parts: Iterable[tuple[Terms, float]]) -> Terms:
    """Adds up terms. Products that differ in their scale alone become one."""
    products: dict[Any, Product] = {}
    others: list[Term] = []
    is_repeated = False
    for terms, times in parts:
        for term in terms:
            if isinstance(term, Product):
                kind = _kind(term)
                scale = products[kind].scale if kind in products else 0.0
                products[kind] = term._replace(scale=scale + times * term.scale)
            else:
                others.append(term)
                is_repeated |= times != 1
    whole = [term for term in others if isinstance(term, Whole)]
    is_alone = len(others) + len(products) == 1
    # The program makes these for each example anyway, so it adds them up as well.
    is_made_anyway = len(whole) > 1 or any(term.depends for term in whole)
    if is_repeated or (is_made_anyway and not is_alone):
        reasons = dict.fromkeys(term.why for term in whole)
        return site.scope.whole(site.variable, "; ".join(reasons) or "a sum")
    return (*products.values(), *others)


def _kind(term: Product) -> Any:
    """Returns a key that two products share if they differ in their scale alone."""
    places: dict[Axis, int] = {}

    def placed(axes: Iterable[Axis]) -> tuple[int, ...]:
        return tuple(places.setdefault(axis, len(places)) for axis in axes)

    def named(operand: Operand) -> Any:
        axes = placed(operand.stacked), placed(operand.axes)
        return (operand.ref, operand.preparations, *axes)

    operands = tuple(map(named, (term.lhs, term.rhs, *term.factors)))
    out = placed(term.out), term.one_hot and placed([term.one_hot])
    return operands, out, term.moves, term.precision, tuple(axis.size for axis in places)
