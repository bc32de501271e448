"""The gradients of one leaf for all examples, in the form that its plan needs."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _leaves
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

    def kept(self) -> "LeafGradients":
        """What the sum needs once the norms are known."""
        return self._replace(each=None) if self.products else self


def leaf_gradients(plan: Plan, values: Values, examples: int) -> LeafGradients:
    """Forms the gradients of one leaf from the values of its operands."""
    terms = [term for term in plan.terms if isinstance(term, Product)]
    parts = [factors_of(term, values, examples) for term in terms]
    if _leaves.wide_dtype(plan.dtype, *(part.rhs.dtype for part in parts)) == np.float64:
        # A program can cast a leaf to another width for some of its terms.
        parts = [part.widened(np.float64) for part in parts]
    found = LeafGradients(plan, examples, list(zip(terms, parts, strict=True)), None, None)
    for term in plan.terms:
        if isinstance(term, Whole) and term.depends:
            found = found._replace(each=values[term.ref])
        elif isinstance(term, Whole):
            constant = jnp.broadcast_to(jnp.asarray(values[term.ref]), plan.shape)
            found = found._replace(constant=constant)
    return _with_each(found) if plan.way is Way.EACH else found


def _with_each(leaf: LeafGradients) -> LeafGradients:
    each = made(leaf)
    # The plan keeps whichever is smaller: the factors, or the gradients themselves.
    if leaf.products and leaf.plan.entries < math.prod(leaf.plan.shape):
        return leaf._replace(each=each)
    return leaf._replace(products=[], constant=None, each=each)


def made(leaf: LeafGradients) -> Array:
    """The gradient of each example."""
    if leaf.each is not None:
        return leaf.each
    plan = leaf.plan
    each: Any = jnp.zeros((leaf.examples, *plan.shape), plan.dtype)
    for term, parts in leaf.products:
        gradients = jax.vmap(functools.partial(assembled, term))(each_product(parts))
        each = each + gradients.astype(plan.dtype)
    return each if leaf.constant is None else each + leaf.constant[None].astype(plan.dtype)
