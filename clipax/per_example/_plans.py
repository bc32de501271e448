"""The plan for each leaf: the cheapest exact way to the norms of its gradients."""

import enum
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from clipax._core import _paths
from clipax.per_example._preparations import Windows
from clipax.per_example._programs import Ref
from clipax.per_example._roles import layout, roles, turned
from clipax.per_example._scopes import Scope
from clipax.per_example._terms import Passed, Product, Terms, Whole
from clipax.per_example._tracing import ExampleProgram
from clipax.per_example._walk import terms_of

# Filling a matrix with zeros and reading it again takes about as long as this many products.
_PASSES_OF_A_SCATTER = 4


class Way(enum.Enum):
    """How the norm of a leaf's gradient is found."""

    ZERO = "is zero"
    OUTER = "norms of two vectors"
    GRAM = "Gram matrices"
    EACH = "made for each example"


class Plan(NamedTuple):
    """What is done for one leaf."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    terms: tuple[Product | Whole, ...]
    way: Way
    why: str
    cost: int
    """How many products of two numbers the norm of one example takes."""
    entries: int
    """How many numbers are kept for one example until its coefficient is known."""

    @property
    def refs(self) -> list[tuple[Ref, bool]]:
        """The values that the terms need, with whether they differ between examples."""
        found = []
        for term in self.terms:
            if isinstance(term, Whole):
                found.append((term.ref, term.depends))
            else:
                operands = (term.lhs, term.rhs, *term.scalars)
                found += [(operand.ref, operand.depends) for operand in operands]
        return found


def plans_of(program: ExampleProgram) -> list[Plan]:
    """One plan for each leaf of the gradient."""
    rows = zip(
        _paths.of_leaves(program.gradient),
        jax.tree.leaves(program.gradient),
        program.gradients,
        strict=True,
    )
    return [plan(name, leaf, program.scope, variable) for name, leaf, variable in rows]


def plan(name: str, leaf: Any, scope: Scope, variable: Any) -> Plan:
    """Chooses by the numbers of operations, which follow from the shapes."""
    if scope.is_mutable:
        terms: Terms = scope.whole(variable, "a program with mutable arrays")
    else:
        terms = terms_of(scope, variable)
        if any(isinstance(term, Passed) for term in terms):
            terms = scope.whole(variable, "an input of a scan")
    products = [term for term in terms if isinstance(term, Product)]
    whole = tuple(term for term in terms if isinstance(term, Whole))
    facts = (name, tuple(leaf.shape), leaf.dtype)
    size = math.prod(leaf.shape)
    if not terms:
        return Plan(*facts, (), Way.ZERO, "no term", 0, 0)
    if not products:
        return Plan(*facts, whole, Way.EACH, f"comes from {whole[0].why}", size, size)
    aligned = _aligned(products)
    if aligned is None:
        whole = scope.whole(variable, "products that do not compare")
        return Plan(*facts, whole, Way.EACH, "products that do not compare", size, size)

    found: tuple[Product | Whole, ...] = (*aligned, *whole)
    sizes = [roles(term).sizes for term in aligned]
    summed = sum(each.summed for each in sizes)
    kept = sum(map(_entries, aligned))
    if summed == sizes[0].shared == 1 and not whole:
        return Plan(*facts, found, Way.OUTER, "a product that sums over nothing", kept, kept)
    by_gram = summed * kept
    by_each = sum(map(_cost_of_each, aligned))
    if by_gram <= by_each:
        return Plan(*facts, found, Way.GRAM, f"{summed} x {summed}", by_gram, kept)
    if size <= kept and not any(map(_has_windows, aligned)):
        # The program's own gradient does not repeat an operand that all examples share.
        found = scope.whole(variable, "")
    return Plan(*facts, found, Way.EACH, "cheaper than its factors", by_each, min(size, kept))


def _has_windows(term: Product) -> bool:
    """Whether a product is of a convolution, whose own program is slow for a batch of kernels."""
    return any(isinstance(each, Windows) for each in term.lhs.preparations)


def _entries(term: Product) -> int:
    sizes = roles(term).sizes
    rows = 1 if term.one_hot is not None else sizes.rows
    return sizes.shared * sizes.summed * (rows + sizes.columns)


def _cost_of_each(term: Product) -> int:
    sizes = roles(term).sizes
    if term.one_hot is not None:
        return _PASSES_OF_A_SCATTER * sizes.result + sizes.shared * sizes.summed * sizes.columns
    return sizes.summed * sizes.result


def _aligned(products: Sequence[Product]) -> list[Product] | None:
    """The products in one layout, some with exchanged operands; None if no layout fits all."""
    fixed = [term for term in products if term.one_hot is not None]
    wanted = layout((fixed or products)[0])
    aligned = []
    for term in products:
        can_turn = term.one_hot is None
        fitting = [
            each for each in (term, turned(term) if can_turn else term) if layout(each) == wanted
        ]
        if not fitting:
            return None
        aligned.append(fitting[0])
    return aligned
