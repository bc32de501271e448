"""The gradients of one leaf for all examples, in the form that its plan needs."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _compat, _leaves
from clipax._core._typing import Array
from clipax.per_example._boxes import Box
from clipax.per_example._factors import Factors, each_product, factors_of
from clipax.per_example._plans import Plan, Way
from clipax.per_example._programs import Values
from clipax.per_example._terms import Product, Whole


class Kind(NamedTuple):
    """What alike leaves have in common."""

    examples: int
    shape: tuple[int, ...]
    dtype: Any
    way: Way
    boxes: tuple[Box, ...]
    """Where the parts are."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["products", "constant", "each", "parts"],
    meta_fields=["kind"],
)
@dataclasses.dataclass(frozen=True)
class LeafGradients:
    """The sum of some products and a constant, or each gradient as it is.

    It is a tree of arrays, so that jitted functions of alike leaves share a trace.
    """

    kind: Kind
    products: list[Factors]
    constant: Array | None
    """An array that is added to the gradient of every example."""
    each: Array | None
    """The gradients of all examples, which are made only where the plan says so."""
    parts: "tuple[LeafGradients, ...]" = ()
    """The gradients of the parts, with their entries of the constant."""

    def kept(self) -> "LeafGradients":
        """What the sum needs once the norms are known."""
        parts = tuple(part.kept() for part in self.parts)
        each = None if self.products else self.each
        return dataclasses.replace(self, each=each, parts=parts)


def leaf_gradients(plan: Plan, values: Values, examples: int) -> LeafGradients:
    """Forms the gradients of one leaf from the values of its operands."""
    terms = [term for term in plan.terms if isinstance(term, Product)]
    products = [factors_of(term, values, examples) for term in terms]
    if _leaves.wide_dtype(plan.dtype, *(each.rhs.dtype for each in products)) == np.float64:
        # A program can cast a leaf to another width for some of its terms.
        products = [each.widened(np.float64) for each in products]
    constant, each = (as_made(plan, values, depends) for depends in (False, True))
    boxes = tuple(box for box, _ in plan.parts)
    parts = tuple(leaf_gradients(part, values, examples) for _, part in plan.parts)
    kind = Kind(examples, plan.shape, plan.dtype, plan.way, boxes)
    found = LeafGradients(kind, products, constant, each, parts)
    if plan.way is not Way.EACH or parts:
        return found
    each = _added_up(found)
    # The plan keeps whichever is smaller: the factors, or the gradients themselves.
    if products and plan.entries < math.prod(plan.shape):
        return dataclasses.replace(found, each=each)
    return LeafGradients(kind, [], None, each)


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


def made(leaf: LeafGradients) -> Array:
    """The gradient of each example."""
    return _added_up(leaf) if leaf.each is None else leaf.each


@jax.jit
def _added_up(leaf: LeafGradients) -> Array:
    kind = leaf.kind
    each: Any = leaf.each
    if each is None:
        each = jnp.zeros((kind.examples, *kind.shape), kind.dtype)
    for factors in leaf.products:
        gradients = jax.vmap(factors.assembly.assembled)(each_product(factors))
        each = each + gradients.astype(kind.dtype)
    if leaf.constant is not None:
        each = each + leaf.constant[None].astype(kind.dtype)
    for box, part in zip(kind.boxes, leaf.parts, strict=True):
        entries = made(part)
        each = jax.vmap(box.replaced)(_compat.varying_like(each, entries), entries)
    return each
