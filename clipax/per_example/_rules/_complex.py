"""Rules of primitives that take complex numbers apart."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from clipax.per_example._rules._recipes import MOST_CHANGED, Recipe, Site, rule
from clipax.per_example._terms import Operand, Product, Term, Terms

_Halves = Sequence[tuple[Any, Any, float]]
"""What is taken of `lhs` and of `rhs` for each product, with its scale."""
_REAL: _Halves = [(jnp.real, jnp.real, 1.0), (jnp.imag, jnp.imag, -1.0)]
_IMAG: _Halves = [(jnp.real, jnp.imag, 1.0), (jnp.imag, jnp.real, 1.0)]


@rule("conj")
def _conj(site: Site) -> Recipe:
    return _made_of(site, [(jnp.conj, jnp.conj, 1.0)])


@rule("real")
def real_part(site: Site) -> Recipe:
    return _made_of(site, _REAL)


@rule("imag")
def _imag(site: Site) -> Recipe:
    return _made_of(site, _IMAG)


def _made_of(site: Site, halves: _Halves) -> Recipe:
    def combine(terms: Terms) -> Terms | None:
        found: list[Term] = []
        for term in terms:
            if not isinstance(term, Product) or not _can_prepare(term):
                return None
            # The zeros and ones of a table are real.
            some = halves if term.one_hot is None else [halves[0]]
            found += [_prepared(term, *half) for half in some]
        return tuple(found) if len(found) <= MOST_CHANGED else None

    return Recipe([site.origin(0)], combine)


def _can_prepare(term: Product) -> bool:
    is_real = not any(
        jnp.issubdtype(scalar.ref.variable.aval.dtype, np.complexfloating)
        for scalar in term.scalars
    )
    return is_real and not term.lhs.times and not term.rhs.times


def _prepared(term: Product, of_lhs: Any, of_rhs: Any, scale: float) -> Product:
    def after(operand: Operand, preparation: Any) -> Operand:
        return operand._replace(preparations=(*operand.preparations, preparation))

    lhs = term.lhs if term.one_hot is not None else after(term.lhs, of_lhs)
    return term._replace(lhs=lhs, rhs=after(term.rhs, of_rhs), scale=scale * term.scale)
