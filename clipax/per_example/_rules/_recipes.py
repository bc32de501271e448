"""The vocabulary of rules: a rule turns a site into a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from clipax.per_example._programs import Equation
from clipax.per_example._scopes import Origin, Scope
from clipax.per_example._terms import Product, Terms, Whole

# A sum of more terms than this is taken as it is when an equation scales or moves it. Terms
# could otherwise double with each equation, as in a chain of `w = w + move(w)`.
MOST_CHANGED = 1024


class Site(NamedTuple):
    """One output of an equation in its scope."""

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
        """The origin of one operand."""
        return self.scope.origin(self.equation.invars[index])


class Recipe(NamedTuple):
    """How to make the terms of a variable from the terms of others."""

    origins: Sequence[Origin]
    """The others."""
    combine: Callable[..., Terms | None]
    """Takes their terms, in order. Returns None if the variable has to be taken as it is."""


Rule: TypeAlias = Callable[[Site], Recipe | None]
RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Enters a rule for some primitives. It returns None for an equation that it cannot read."""

    def enter(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return enter


def finished(terms: Terms | None) -> Recipe | None:
    """The recipe of terms that need no others."""
    return None if terms is None else Recipe((), lambda: terms)


def term_by_term(
    origin: Origin, change: Callable[[Any], Any], *, moves_entries: bool = False
) -> Recipe:
    """The recipe that changes each term of one other variable."""
    return Recipe([origin], lambda terms: changed(terms, change, moves_entries=moves_entries))


def changed(
    terms: Terms, change: Callable[[Any], Any], *, moves_entries: bool = False
) -> Terms | None:
    """Changes terms one by one. Returns None if one of them cannot be changed.

    What the program makes is taken after the change, unless that would take other terms with it:
    those beside what all examples share, or what lies in a box. Only moves can change these.
    """
    is_whole = all(isinstance(term, Whole) and term.box is None for term in terms)
    if len(terms) > MOST_CHANGED:
        return None
    found = []
    for term in terms:
        can_move = isinstance(term, Whole) and not (term.depends and term.box is None)
        is_changed = isinstance(term, Product) or (can_move and moves_entries and not is_whole)
        new = change(term) if is_changed else None
        if new is None:
            return None
        found.append(new)
    return tuple(found)
