"""The gradients of one leaf for all examples, in the form that its plan needs."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _compat, _leaves
from clipax._core._typing import Array
from clipax.per_example._factors import Factors, each_product, factors_of
from clipax.per_example._plans import Plan, Way
from clipax.per_example._programs import Values
from clipax.per_example._roles import assembled
from clipax.per_example._terms import Product, Whole


class LeafGradients(NamedTuple):
    """The sum of some products and a constant, or each gradient as it is."""

    plan: Plan
    examples: int
    products: list[tuple[Product, Factors]]
    constant: Array | None
    """An array that is added to the gradient of every example."""
    each: Array | None
    """The gradients of all examples, which are made only where the plan says so."""
    parts: "tuple[LeafGradients, ...]" = ()
    """The gradients of the parts of the plan, with their entries of the constant."""

    def kept(self) -> "LeafGradients":
        """What the sum needs once the norms are known."""
        parts = tuple(part.kept() for part in self.parts)
        return self._replace(each=None if self.products else self.each, parts=parts)


def leaf_gradients(plan: Plan, values: Values, examples: int) -> LeafGradients:
    """Forms the gradients of one leaf from the values of its operands."""
    terms = [term for term in plan.terms if isinstance(term, Product)]
    factors = [factors_of(term, values, examples) for term in terms]
    if _leaves.wide_dtype(plan.dtype, *(each.rhs.dtype for each in factors)) == np.float64:
        # A program can cast a leaf to another width for some of its terms.
        factors = [each.widened(np.float64) for each in factors]
    products = list(zip(terms, factors, strict=True))
    constant, each = (as_made(plan, values, depends) for depends in (False, True))
    parts = tuple(leaf_gradients(part, values, examples) for _, part in plan.parts)
    found = LeafGradients(plan, examples, products, constant, each, parts)
    return _with_each(found) if plan.way is Way.EACH and not parts else found


def as_made(plan: Plan, values: Values, depends: bool) -> Array | None:
    """The sum of the terms that the program makes, for each example or for all."""

    def moved(term: Whole, value: Any) -> Array:
        value = jnp.asarray(value)
        for move in term.moves:
            value = move(value)
        return value if value.ndim else jnp.broadcast_to(value, plan.shape)

    found = []
    for term in plan.terms:
        if isinstance(term, Whole) and term.depends is depends:
            move = functools.partial(moved, term)
            value = values[term.ref]
            found.append(jax.vmap(move)(value).astype(plan.dtype) if depends else move(value))
    if len({array.dtype for array in found}) > 1:
        wide = _leaves.widened_dtype(plan.dtype, *(array.dtype for array in found))
        found = [array.astype(wide) for array in found]
    return functools.reduce(jnp.add, found) if found else None


def _with_each(leaf: LeafGradients) -> LeafGradients:
    each = _added_up(leaf)
    # The plan keeps whichever is smaller: the factors, or the gradients themselves.
    if leaf.products and leaf.plan.entries < math.prod(leaf.plan.shape):
        return leaf._replace(each=each)
    return leaf._replace(products=[], constant=None, each=each)


def made(leaf: LeafGradients) -> Array:
    """The gradient of each example."""
    return _added_up(leaf) if leaf.each is None else leaf.each


def _added_up(leaf: LeafGradients) -> Array:
    plan = leaf.plan
    each: Any = leaf.each
    if each is None:
        each = jnp.zeros((leaf.examples, *plan.shape), plan.dtype)
    for term, factors in leaf.products:
        gradients = jax.vmap(functools.partial(assembled, term))(each_product(factors))
        each = each + gradients.astype(plan.dtype)
    if leaf.constant is not None:
        each = each + leaf.constant[None].astype(plan.dtype)
    for (box, _), part in zip(plan.parts, leaf.parts, strict=False):
        entries = made(part)
        each = jax.vmap(box.replaced)(_compat.varying_like(each, entries), entries)
    return each
