"""Finds the terms of a variable: each of the variables before it is visited once.

A rule says of one equation from which other terms its own follow. The walk sees to it that
these are known, and calls nothing that calls itself: programs can be long.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from clipax._programs import Equation, is_variable
from clipax._terms import Axis, Operand, Origin, Passed, Product, Scope, Term, Terms, Whole

# What a sum of more terms than this is scaled or moved by, is not done to each of them.
_MOST_CHANGED = 1024


class Site(NamedTuple):
    """An equation, which of its outputs is wanted, and where it stands."""

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
        """Where an operand comes from."""
        return self.scope.origin(self.equation.invars[index])


class Recipe(NamedTuple):
    """How the terms of a variable follow from those of others."""

    places: Sequence[Origin]
    """Where the others stand."""
    combine: Callable[..., Terms | None]
    """Of their terms, in order; None where the variable is best taken as it is."""


Rule = Callable[[Site], Recipe | None]
_RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Enters a function that reads equations of these primitives; None if one is beyond it."""

    def enter(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(primitives, function))
        return function

    return enter


def terms_of(scope: Scope, variable: Any) -> Terms:
    """The terms that add up to a variable. None of them is zero."""
    wanted = scope.origin(variable)
    recipes: dict[Origin, Recipe] = {}
    pending = [wanted]
    while pending:
        place = pending[-1]
        if _known(place) is not None:
            pending.pop()
            continue
        if place not in recipes:
            recipes[place] = _recipe(*place)
        before = recipes[place].places
        unknown = [each for each in before if _known(each) is None]
        pending += unknown
        if not unknown:
            here, atom = pending.pop()
            terms = recipes.pop(place).combine(*map(_known, before))
            here.terms[atom] = _as_it_is(here, atom) if terms is None else terms
    return _known(wanted) or ()


def _known(place: Origin) -> Terms | None:
    scope, atom = place
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


# -- What recipes are made of --------------------------------------------------------------------


def made(terms: Terms | None) -> Recipe | None:
    """Of terms that follow from no others."""
    return None if terms is None else Recipe((), lambda: terms)


def each(place: Origin, change: Callable[[Product], Product | None]) -> Recipe:
    """Of the terms of one other variable, changed."""
    return Recipe([place], lambda terms: changed(terms, change))


def changed(terms: Terms, change: Callable[[Product], Product | None]) -> Terms | None:
    """The terms, changed one by one; None where one of them cannot be."""
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


def _summands(place: Origin) -> dict[Origin, float]:
    """What a sum of sums adds up, and how often each of it."""
    order: list[Origin] = []
    seen: set[Origin] = set()
    pending = [(place, False)]
    while pending:
        here, is_after_its_parts = pending.pop()
        if is_after_its_parts:
            order.append(here)
        elif here not in seen:
            seen.add(here)
            pending.append((here, True))
            pending += [(part, False) for part in _parts(here)]
    # A float: sums that are added to themselves a thousand times come to infinity.
    times = dict.fromkeys(order, 0.0) | {place: 1.0}
    for here in reversed(order):
        for part in _parts(here):
            times[part] += times[here]
    return {here: times[here] for here in order if not _parts(here)}


def _parts(place: Origin) -> list[Origin]:
    scope, atom = place
    equation, _ = scope.maker(atom)
    if equation is None or equation.primitive.name not in ("add", "add_any"):
        return []
    return [scope.origin(operand) for operand in equation.invars]


def total(site: Site, parts: Iterable[tuple[Terms, float]]) -> Terms:
    """The terms of a sum; those that differ by their scale alone become one."""
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
    # What is made for each example anyway is added up by the program itself.
    is_made_anyway = len(whole) > 1 or any(term.depends for term in whole)
    if is_repeated or (is_made_anyway and not is_alone):
        reasons = dict.fromkeys(term.why for term in whole)
        return site.scope.whole(site.variable, "; ".join(reasons) or "a sum")
    return (*products.values(), *others)


def _kind(term: Product) -> Any:
    """Equal for products that are equal but for their scale."""
    places: dict[Axis, int] = {}

    def placed(axes: Iterable[Axis]) -> tuple[int, ...]:
        return tuple(places.setdefault(axis, len(places)) for axis in axes)

    def named(operand: Operand) -> Any:
        axes = placed(operand.stacked), placed(operand.axes)
        return (operand.ref, operand.preparations, *axes)

    operands = tuple(map(named, (term.lhs, term.rhs, *term.factors)))
    out = placed(term.out), term.one_hot and placed([term.one_hot])
    return operands, out, term.moves, term.precision, tuple(axis.size for axis in places)
