"""The norms of each leaf's gradients."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clipax._core import _compat, _leaves
from clipax._core._typing import Array
from clipax.per_example import _grams
from clipax.per_example._factors import Factors
from clipax.per_example._gradients import LeafGradients
from clipax.per_example._plans import Plan, Way
from clipax.per_example._roles import rest_of, taken_apart


def norms_of_leaves(leaves: Sequence[LeafGradients]) -> list[Array]:
    """One norm per example, for each leaf."""
    norms = iter(_norms_at_once([part for leaf in leaves for part in leaf.parts or (leaf,)]))
    return [
        _with_rest([next(norms) for _ in leaf.parts], leaf) if leaf.parts else next(norms)
        for leaf in leaves
    ]


def _with_rest(norms: Sequence[Array], leaf: LeafGradients) -> Array:
    """The norms of a leaf from those of its parts, which have no entry in common."""
    norm = _grams.row_norms(jnp.stack(norms, 1))
    rest = None if leaf.constant is None else beside_parts(leaf.plan, leaf.constant)
    return _grams.with_rest(norm, rest).astype(norm.dtype)


def beside_parts(plan: Plan, constant: Array) -> Array:
    """A constant without its entries in the parts of a leaf."""
    for box, _ in plan.parts:
        zeros = _compat.varying_like(jnp.zeros(box.sizes, constant.dtype), constant)
        constant = box.replaced(constant, zeros)
    return constant


def _norms_at_once(leaves: Sequence[LeafGradients]) -> list[Array]:
    """One norm per example, for each leaf that has no parts.

    Norms by Gram matrices lose their digits where products nearly cancel. If that happens to one
    example, all of these norms are found again from gradients, made one example at a time.
    """
    sums = [_gram_sum(leaf) for leaf in leaves]
    norms, exact = [], []
    for leaf, gram_sum in zip(leaves, sums, strict=True):
        if gram_sum is None:
            norms.append(_direct_norms(leaf))
        else:
            found, is_exact = gram_sum.norms()
            norms.append(found)
            exact.append(jnp.all(is_exact))
    if not exact:
        return norms

    def again() -> list[Array]:
        of_sums = [(each.factors, each.block) for each in sums if each is not None]
        made = iter(_grams.made_norms(of_sums))
        rows = zip(norms, sums, strict=True)
        return [norm if each is None else each.completed(next(made)) for norm, each in rows]

    return list(jax.lax.cond(jnp.all(jnp.stack(exact)), lambda: norms, again))


def norms_of(leaf: LeafGradients) -> tuple[Array, Array]:
    """One norm per example of a leaf without parts, and which of them are exact enough."""
    gram_sum = _gram_sum(leaf)
    if gram_sum is None:
        norms = _direct_norms(leaf)
        return norms, jnp.ones(norms.shape, bool)
    return gram_sum.norms()


def _direct_norms(leaf: LeafGradients) -> Array:
    dtype = _leaves.wide_dtype(leaf.plan.dtype)
    if leaf.plan.way is Way.OUTER:
        return _grams.outer_norms(leaf.products[0][1]).astype(dtype)
    if leaf.each is not None:
        return _grams.row_norms(leaf.each)
    return jnp.zeros((leaf.examples,), dtype)


class _GramSum(NamedTuple):
    """A leaf's gradients as sums of products and of a constant."""

    factors: list[Factors]
    block: Array | None
    """The part of the constant in the block that the products fill."""
    rest: Array | None
    """The rest of the constant."""
    dtype: Any

    def norms(self) -> tuple[Array, Array]:
        """The norms, and which of them are exact enough."""
        norms, is_exact = _grams.gram_norms(self.factors, self.block)
        return self.completed(norms), is_exact

    def completed(self, norms: Array) -> Array:
        """Adds what is beside the block."""
        return _grams.with_rest(norms, self.rest).astype(self.dtype)


def _gram_sum(leaf: LeafGradients) -> _GramSum | None:
    if leaf.plan.way is not Way.GRAM:
        return None
    factors = [parts for _, parts in leaf.products]
    dtype = leaf.plan.dtype
    if leaf.constant is None:
        return _GramSum(factors, None, None, _leaves.wide_dtype(dtype))
    width = _leaves.wide_dtype(dtype, *(part.rhs.dtype for part in factors))
    constant = _leaves.widened(leaf.constant, width)
    term = leaf.products[0][0]
    block = taken_apart(term, constant)
    return _GramSum(factors, block, rest_of(term, constant, block), _leaves.wide_dtype(dtype))
