"""The norms of each leaf's gradients."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from clipax._core import _branches, _compat, _leaves
from clipax._core._typing import Array
from clipax.per_example import _grams
from clipax.per_example._boxes import Box
from clipax.per_example._gradients import LeafGradients
from clipax.per_example._plans import Way


def norms_of_leaves(leaves: Sequence[LeafGradients], mask: Array | None) -> list[Array]:
    """One norm per example, for each leaf; where the mask is False, digits may be lost."""
    parts = [part for leaf in leaves for part in leaf.parts or (leaf,)]
    norms = iter(_norms_at_once(parts, mask))
    return [
        _with_rest([next(norms) for _ in leaf.parts], leaf) if leaf.parts else next(norms)
        for leaf in leaves
    ]


def _with_rest(norms: Sequence[Array], leaf: LeafGradients) -> Array:
    """The norms of a leaf from those of its parts, which have no entry in common."""
    norm = _grams.row_norms(jnp.stack(norms, 1))
    rest = None if leaf.constant is None else beside_parts(leaf.kind.boxes, leaf.constant)
    return _grams.with_rest(norm, rest).astype(norm.dtype)


def beside_parts(boxes: Sequence[Box], constant: Array) -> Array:
    """A constant without its entries in the parts of a leaf."""
    for box in boxes:
        zeros = _compat.varying_like(jnp.zeros(box.sizes, constant.dtype), constant)
        constant = box.replaced(constant, zeros)
    return constant


def _norms_at_once(leaves: Sequence[LeafGradients], mask: Array | None) -> list[Array]:
    """One norm per example, for each leaf that has no parts.

    Norms by Gram matrices lose their digits where products nearly cancel. If that happens to one
    counted example, all of these norms are found again from gradients, made one at a time.
    """
    rows = [norms_of(leaf) for leaf in leaves]
    norms = [norm for norm, _ in rows]
    exact = [each for _, each in rows if each is not None]
    if not exact:
        return norms

    def again() -> list[Array]:
        sums = [leaf for leaf, (_, each) in zip(leaves, rows, strict=True) if each is not None]
        made = iter(_norms_of_made(sums))
        return [norm if each is None else next(made) for norm, each in rows]

    return list(_branches.where_any(is_inexact(exact, mask), again, lambda: norms))


def is_inexact(exact: Sequence[Array], mask: Array | None) -> Array:
    """Which counted examples have a norm that is not exact enough."""
    inexact = ~jnp.all(jnp.stack(exact), 0)
    return inexact if mask is None else inexact & mask


@jax.jit
def norms_of(leaf: LeafGradients) -> tuple[Array, Array | None]:
    """One norm per example of a leaf without parts.

    Also returns which of them are exact enough, or None if all are.
    """
    way, dtype = leaf.kind.way, _leaves.wide_dtype(leaf.kind.dtype)
    if way is Way.GRAM:
        block, rest = _block_and_rest(leaf)
        norms, is_exact = _grams.gram_norms(leaf.products, block)
        return _grams.with_rest(norms, rest).astype(dtype), is_exact
    if way is Way.OUTER:
        return _grams.outer_norms(leaf.products[0]).astype(dtype), None
    if leaf.each is not None:
        return _grams.row_norms(leaf.each), None
    return jnp.zeros((leaf.kind.examples,), dtype), None


def _norms_of_made(leaves: Sequence[LeafGradients]) -> list[Array]:
    constants = [_block_and_rest(leaf) for leaf in leaves]
    sums = [(leaf.products, block) for leaf, (block, _) in zip(leaves, constants, strict=True)]
    rows = zip(leaves, _grams.made_norms(sums), constants, strict=True)
    return [
        _grams.with_rest(norm, rest).astype(_leaves.wide_dtype(leaf.kind.dtype))
        for leaf, norm, (_, rest) in rows
    ]


def _block_and_rest(leaf: LeafGradients) -> tuple[Array | None, Array | None]:
    """The part of the constant in the block that the products fill, and the rest of it."""
    if leaf.constant is None:
        return None, None
    dtypes = [part.rhs.dtype for part in leaf.products]
    constant = _leaves.widened(leaf.constant, _leaves.wide_dtype(leaf.kind.dtype, *dtypes))
    assembly = leaf.products[0].assembly
    block = assembly.taken_apart(constant)
    return block, assembly.rest_of(constant, block)
