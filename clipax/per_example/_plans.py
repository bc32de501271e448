"""For each leaf, the cheapest exact way to the norms and the weighted sum of its gradients."""

import enum
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax import coefficients
from clipax._core import _compat, _leaves
from clipax._core._typing import Array
from clipax.per_example import _grams
from clipax.per_example._grams import Values
from clipax.per_example._preparations import Windows
from clipax.per_example._products import terms_of
from clipax.per_example._programs import Ref
from clipax.per_example._terms import Product, Scope, Terms, Whole

# To fill a matrix with zeros and to read it again takes about as long as this many products.
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
    """Products of numbers for the norm of one example."""
    entries: int
    """Numbers that are made for it, and kept, for one example."""

    @property
    def refs(self) -> list[tuple[Ref, bool]]:
        """What has to be evaluated, and whether it differs from example to example."""
        found = []
        for term in self.terms:
            if isinstance(term, Whole):
                found.append((term.ref, term.depends))
            else:
                operands = (term.lhs, term.rhs, *term.factors)
                found += [(operand.ref, operand.depends) for operand in operands]
        return found


class Kept(NamedTuple):
    """What of a leaf is kept until the coefficients are known."""

    products: list[tuple[Product, _grams.Factors]]
    constant: Array | None
    """What is added to the gradient of every example alike."""
    each: Array | None
    """The gradients, in the place of their factors."""


def plan(name: str, leaf: Any, scope: Scope, variable: Any) -> Plan:
    """Chooses by the numbers of operations, which the shapes tell."""
    if scope.is_mutable:
        terms: Terms = scope.whole(variable, "a program with mutable arrays")
    else:
        terms = terms_of(scope, variable)
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
    sizes = [_grams.roles(term).sizes for term in aligned]
    summed = sum(each.summed for each in sizes)
    kept = sum(map(_entries, aligned))
    if summed == sizes[0].shared == 1 and not whole:
        return Plan(*facts, found, Way.OUTER, "a product that sums over nothing", kept, kept)
    by_gram = summed * kept
    by_each = sum(map(_cost_of_each, aligned))
    if by_gram <= by_each:
        return Plan(*facts, found, Way.GRAM, f"{summed} x {summed}", by_gram, kept)
    if size <= kept and not any(map(_has_windows, aligned)):
        # As the program makes it: a factor that is one for all examples is then not repeated.
        found = scope.whole(variable, "")
    return Plan(*facts, found, Way.EACH, "cheaper than its factors", by_each, min(size, kept))


def _has_windows(term: Product) -> bool:
    """Whether it is of a convolution, whose own program is slow for a batch of kernels."""
    return any(isinstance(each, Windows) for each in term.lhs.preparations)


def _entries(term: Product) -> int:
    sizes = _grams.roles(term).sizes
    rows = 1 if term.one_hot is not None else sizes.rows
    return sizes.shared * sizes.summed * (rows + sizes.columns)


def _cost_of_each(term: Product) -> int:
    sizes = _grams.roles(term).sizes
    if term.one_hot is not None:
        return _PASSES_OF_A_SCATTER * sizes.result + sizes.shared * sizes.summed * sizes.columns
    return sizes.summed * sizes.result


def _aligned(products: Sequence[Product]) -> list[Product] | None:
    """The products in one layout, some with their factors exchanged; None if none fits."""
    fixed = [term for term in products if term.one_hot is not None]
    wanted = _grams.layout((fixed or products)[0])
    aligned = []
    for term in products:
        can_turn = term.one_hot is None
        fitting = [
            each
            for each in (term, _grams.turned(term) if can_turn else term)
            if _grams.layout(each) == wanted
        ]
        if not fitting:
            return None
        aligned.append(fitting[0])
    return aligned


class Measured(NamedTuple):
    """Of one leaf, for all examples."""

    norms: Array
    kept: Kept
    is_exact: Array | None = None
    """Where the norms are as exact as those of `again`; everywhere, if None."""
    again: Callable[[], Array] | None = None


def measured(plan: Plan, values: Values, examples: int) -> Measured:
    """The norm of the leaf's gradient for each example, and what is kept of it."""
    terms = [term for term in plan.terms if isinstance(term, Product)]
    parts = [_grams.factors(term, values, examples) for term in terms]
    width = _leaves.wide_dtype(plan.dtype, *(part.rhs.dtype for part in parts))
    if width == np.float64:
        # A program can cast a leaf to another width for some of its terms.
        parts = [part.widened(width) for part in parts]
    products = list(zip(terms, parts, strict=True))
    norm_dtype = _leaves.wide_dtype(plan.dtype)
    each = constant = None
    for term in plan.terms:
        if isinstance(term, Whole) and term.depends:
            each = values[term.ref]
        elif isinstance(term, Whole):
            constant = jnp.broadcast_to(jnp.asarray(values[term.ref]), plan.shape)
    if plan.way is Way.ZERO:
        return Measured(jnp.zeros((examples,), norm_dtype), Kept([], None, None))
    if plan.way is Way.OUTER:
        norms = _grams.outer_norms(parts[0]).astype(norm_dtype)
        return Measured(norms, Kept(products, None, None))
    if plan.way is Way.GRAM:
        block = rest = None
        if constant is not None:
            # If the products fill a part of the leaf, so does the block of the constant.
            wide = constant.astype(width)
            block = _grams.taken_apart(terms[0], wide)
            rest = _grams.rest_of(terms[0], wide, block)
        norms, is_exact = _grams.gram_norms(parts, block)

        def complete(norms: Array) -> Array:
            return _grams.with_rest(norms, rest).astype(norm_dtype)

        def again() -> Array:
            return complete(_grams.made_norms(parts, block))

        return Measured(complete(norms), Kept(products, constant, None), is_exact, again)
    if each is None:
        each = _made(plan, products, constant, examples)
    is_smaller = math.prod(plan.shape) <= sum(_entries(term) for term, _ in products)
    kept = Kept(products, constant, None) if products and not is_smaller else Kept([], None, each)
    return Measured(_grams.row_norms(each), kept)


def exact_norms(leaves: Sequence[Measured]) -> list[Array]:
    """The norms of all leaves, with those measured again that lost too many digits."""
    norms = [leaf.norms for leaf in leaves]
    exact = [jnp.all(leaf.is_exact) for leaf in leaves if leaf.is_exact is not None]
    if not exact:
        return norms

    def again() -> list[Array]:
        return [leaf.norms if leaf.again is None else leaf.again() for leaf in leaves]

    return list(jax.lax.cond(jnp.all(jnp.stack(exact)), lambda: norms, again))


def _made(plan: Plan, products: Any, constant: Array | None, examples: int) -> Array:
    each = jnp.zeros((examples, *plan.shape), plan.dtype)
    for term, parts in products:
        blocks = _grams.each_product(parts)
        each = each + jax.vmap(functools.partial(_grams.assembled, term))(blocks).astype(
            plan.dtype
        )
    return each if constant is None else each + constant[None].astype(plan.dtype)


def weighted_sum(
    plan: Plan, kept: Kept, weights: coefficients.Factors, is_kept_out: Array | None
) -> Array:
    """The sum of the examples' gradients, each times its weight.

    Of examples that are kept out nothing may come in, not even times zero: it may be NaN.
    """
    wide = _leaves.widened(jnp.zeros((), plan.dtype)).dtype

    def without(array: Array) -> Array:
        if is_kept_out is None:
            return array
        return jnp.where(is_kept_out.reshape(-1, *[1] * (array.ndim - 1)), 0, array)

    first, second = (weight.astype(wide) for weight in weights)
    total = _compat.varying_like(jnp.zeros(plan.shape, wide), second)
    if kept.each is not None:
        each = without(kept.each).astype(wide)
        each *= first.reshape(-1, *[1] * (each.ndim - 1))
        total += jnp.tensordot(second, each, 1)
    for term, parts in kept.products:
        lhs = parts.lhs if parts.is_one_hot else without(parts.lhs)
        parts = parts._replace(lhs=lhs, rhs=without(parts.rhs))
        total += _grams.assembled(term, _grams.weighted_product(parts, weights)).astype(wide)
    if kept.constant is not None:
        constant = kept.constant.astype(wide)
        if is_kept_out is not None:
            constant = jnp.where(jnp.all(is_kept_out), 0, constant)
        # Of a large constant, every example has a small weight.
        largest = jnp.max(first)
        total += jnp.sum(first / largest * second) * (largest * constant)
    return total
