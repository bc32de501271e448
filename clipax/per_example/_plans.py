"""The plan for each leaf: the cheapest exact way to the norms of its gradients."""

import enum
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from clipax._core import _paths
from clipax.per_example._boxes import Box
from clipax.per_example._pieces import constants_of, pieces_of
from clipax.per_example._placing import written_out
from clipax.per_example._preparations import Windows
from clipax.per_example._programs import Ref
from clipax.per_example._roles import entries_of, layout, roles, turned
from clipax.per_example._scopes import Scope
from clipax.per_example._terms import Axis, Passed, Placed, Product, Whole
from clipax.per_example._tracing import ExampleProgram
from clipax.per_example._walk import terms_of

# Filling a matrix with zeros and reading it again takes about as long as this many products.
_PASSES_OF_A_SCATTER = 4


# Reasons why a gradient is made for each example.
CHEAPER = "cheaper than its factors"
DO_NOT_COMPARE = "products that do not compare"
MUTABLE = "a program with mutable arrays"
PASSED = "an input of a scan"


class Way(enum.Enum):
    """How the norm of a leaf's gradient is found."""

    ZERO = "is zero"
    OUTER = "norms of two vectors"
    GRAM = "Gram matrices"
    EACH = "made for each example"
    MIXED = "differs between parts"


class Plan(NamedTuple):
    """What is done for one leaf."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    terms: tuple[Placed, ...]
    way: Way
    why: str
    cost: int
    """How many products of two numbers the norm of one example takes."""
    entries: int
    """How many numbers are kept for one example until its coefficient is known."""
    parts: tuple[tuple[Box, "Plan"], ...] = ()
    """If given, the leaf falls into parts that do not overlap, each with a plan of its own. The
    terms are then the constants of the whole leaf."""

    @property
    def refs(self) -> list[tuple[Ref, bool]]:
        """The values that the plan needs, with whether they differ between examples."""
        return [*self.refs_of_terms, *(each for _, part in self.parts for each in part.refs)]

    @property
    def refs_of_terms(self) -> list[tuple[Ref, bool]]:
        """The values that the terms of the plan itself need."""
        found = []
        for term in self.terms:
            if isinstance(term, Whole):
                found.append((term.ref, term.depends))
            else:
                found += [(operand.ref, operand.depends) for operand in term.operands]
        return found


def numbered(plan: Plan) -> Plan:
    """The plan with numbers for names, which is equal for plans that do the same."""
    numbers: dict[Any, int] = {}

    def replaced(each: Any) -> Any:
        if isinstance(each, Ref):
            return Ref((), numbers.setdefault(each, len(numbers)))
        if isinstance(each, Axis):
            return _axis(each.size, numbers.setdefault(each, len(numbers)))
        if isinstance(each, tuple):
            entries = map(replaced, each)
            return type(each)(*entries) if hasattr(each, "_fields") else tuple(entries)
        return each

    return replaced(plan._replace(name=""))


@functools.cache
def _axis(size: int, number: int) -> Axis:
    del number
    return Axis(size)


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
    """A plan for one leaf, which may fall into parts with plans of their own."""
    terms = _terms(scope, variable)
    shape = tuple(leaf.shape)

    def facts(shape: tuple[int, ...]) -> tuple[str, tuple[int, ...], Any]:
        return name, shape, leaf.dtype

    def at_once(terms: Sequence[Placed]) -> Plan:
        return _cheapest(facts(shape), terms, lambda why: scope.whole(variable, why))

    pieces = pieces_of(terms, shape)
    constants = tuple(written_out(term) for term in constants_of(terms))
    if not pieces:
        return at_once(constants)
    if pieces[0].box.is_everything:
        return at_once(pieces[0].terms)
    parts = tuple((box, _cheapest(facts(box.sizes), inside)) for box, inside in pieces)
    ways = dict.fromkeys(part.way for _, part in parts)
    reasons = dict.fromkeys(part.why for _, part in parts)
    cost, kept = (sum(getattr(part, each) for _, part in parts) for each in ("cost", "entries"))
    size, why = math.prod(shape), "; ".join(reasons)
    is_costly = any(_is_costly(term) for _, part in parts for term in part.terms)
    if [*ways] == [Way.EACH] and 2 * kept > size and not is_costly:
        # The program makes all of the leaf in about as much memory.
        return Plan(*facts(shape), scope.whole(variable, why), Way.EACH, why, size, size)
    way = next(iter(ways)) if len(ways) == 1 else Way.MIXED
    why = f"{_counted(len(parts))}: {why}"
    return Plan(*facts(shape), constants, way, why, cost, kept, parts)


def _terms(scope: Scope, variable: Any) -> tuple[Placed, ...]:
    if scope.is_mutable:
        return scope.whole(variable, MUTABLE)
    terms = terms_of(scope, variable)
    found = tuple(term for term in terms if not isinstance(term, Passed))
    return found if len(found) == len(terms) else scope.whole(variable, PASSED)


def _counted(parts: int) -> str:
    return "a part" if parts == 1 else f"{parts} parts"


def _cheapest(
    facts: tuple[str, tuple[int, ...], Any],
    terms: Sequence[Placed],
    of_program: Callable[[str], tuple[Whole]] | None = None,
) -> Plan:
    """Chooses by the numbers of operations, which follow from the shapes.

    Args:
      facts: The name, shape and dtype.
      terms: The terms, which have no boxes.
      of_program: Returns the gradient as the program makes it, if that is more than a part.
    """
    products = [term for term in terms if isinstance(term, Product)]
    whole = tuple(term for term in terms if isinstance(term, Whole))
    size = math.prod(facts[1])
    if not terms:
        return Plan(*facts, (), Way.ZERO, "no term", 0, 0)
    if not products or any(term.depends for term in whole):
        reasons = dict.fromkeys(term.why for term in whole if term.depends) or [whole[0].why]
        return Plan(*facts, tuple(terms), Way.EACH, f"comes from {'; '.join(reasons)}", size, size)
    aligned = _aligned(products)
    if aligned is None:
        made = tuple(terms) if of_program is None else of_program(DO_NOT_COMPARE)
        return Plan(*facts, made, Way.EACH, DO_NOT_COMPARE, size, size)

    found: tuple[Placed, ...] = (*aligned, *whole)
    sizes = [roles(term).sizes for term in aligned]
    summed = sum(each.summed for each in sizes)
    kept = sum(map(entries_of, aligned))
    if len(aligned) == 1 and not whole and _has_one_term_each(aligned[0]):
        return Plan(*facts, found, Way.OUTER, "a product that sums over nothing", kept, kept)
    by_gram = summed * kept
    by_each = sum(map(_cost_of_each, aligned))
    if by_gram <= by_each:
        return Plan(*facts, found, Way.GRAM, f"{summed} x {summed}", by_gram, kept)
    if of_program is not None and size <= kept and not any(map(_is_costly, aligned)):
        # The program's own gradient does not repeat an operand that all examples share.
        found = of_program("")
    return Plan(*facts, found, Way.EACH, CHEAPER, by_each, min(size, kept))


def _has_one_term_each(term: Product) -> bool:
    """Whether no entry of a product is a sum, and its norm is that of two factors."""
    found = roles(term)
    if term.one_hot is None:
        return found.sizes.summed == found.sizes.shared == 1
    return found.sizes.summed == 1 or found.summed == (term.distinct,)


def _is_costly(term: Placed) -> bool:
    """Whether a product is one that the program makes at a higher price."""
    if not isinstance(term, Product):
        return False
    # Its own program of a convolution is slow for a batch of kernels, and that of a product with
    # a factor can make a larger array first.
    has_windows = any(isinstance(each, Windows) for each in term.lhs.preparations)
    return has_windows or bool(term.lhs.times or term.rhs.times)


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
