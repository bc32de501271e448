"""Norms of products for all examples, from their factors.

For `g = lhs^T rhs`, summed over t, `|g|^2 = sum((lhs lhs^H) * (rhs rhs^H))`: the Gram matrices of
the factors are t x t, however large g is. `^H` also conjugates, where numbers are complex.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _leaves, _moments, _range, _reduction
from clipax._core._typing import Array
from clipax.per_example._factors import Factors, each_product, of_one_dtype


def row_norms(array: Array) -> Array:
    """The norm of each example's array."""
    array = array.reshape(array.shape[0], math.prod(array.shape[1:]))
    rows = _reduction.Layout((1,), ())
    return _reduction.separate_norms([array], (rows,), 2.0)[0][:, 0]


def with_rest(norms: Array, rest: Array | None) -> Array:
    """Adds to the norms of blocks a rest that all examples share."""
    if rest is None:
        return norms
    beside = jnp.broadcast_to(row_norms(rest[None]), norms.shape).astype(norms.dtype)
    return row_norms(jnp.stack([norms, beside], 1))


def outer_norms(parts: Factors) -> Array:
    """The norms of products that sum over nothing: those of the two factors, multiplied."""
    # They are small, and a branch would keep a copy.
    if parts.is_one_hot:
        inside = jnp.where(parts.lhs[..., None] < parts.rows, parts.rhs, 0)
        return row_norms_in_two_reads(inside)
    return row_norms_in_two_reads(parts.lhs) * row_norms_in_two_reads(parts.rhs)


@jax.jit
def row_norms_in_two_reads(array: Array) -> Array:
    """The same as `row_norms` by a short program, without a branch."""
    array = jnp.abs(array) if jnp.iscomplexobj(array) else array
    scaled, unit = _in_units(array.reshape(array.shape[0], math.prod(array.shape[1:])))
    return unit * jnp.sqrt(jnp.sum(_leaves.squared_modulus(scaled), 1))


# A sum that is smaller than this share of its parts has lost too many digits.
_LEAST_SHARE = 2.0**-10


def gram_norms(factors: Sequence[Factors], constant: Array | None) -> tuple[Array, Array]:
    """The norm of each example's sum of products, to which a constant may be added.

    Also returns which of them are exact enough: not those whose products nearly cancel.
    """
    scaled: list[tuple[Any, Array]] = [_scaled(part) for part in _joined(factors)]
    if constant is not None:
        constant, unit = _in_units(constant[None])
        scaled.append((constant[0], jnp.broadcast_to(unit, scaled[0][1].shape)))
    largest = functools.reduce(jnp.maximum, [unit for _, unit in scaled])
    total = parts = jnp.zeros_like(largest)
    for (one, unit), (other, other_unit) in itertools.combinations_with_replacement(scaled, 2):
        inner, moduli = _inner(one, other)
        share = (unit / largest) * (other_unit / largest) * (1 if one is other else 2)
        total, parts = total + share * inner, parts + share * moduli
    # Rounding can turn a sum that is nearly zero negative.
    norms = largest * jnp.sqrt(jnp.maximum(total, 0))
    return norms, ~(total < _LEAST_SHARE * parts)


def _joined(factors: Sequence[Factors]) -> list[Factors]:
    """Joins the factors of products of one kind along their summed axes."""
    kinds = [[part for part in factors if part.is_one_hot is kind] for kind in (True, False)]

    def join(parts: list[Factors]) -> Factors:
        lhs = jnp.concatenate(of_one_dtype(*(part.lhs for part in parts)), 2)
        rhs = jnp.concatenate(of_one_dtype(*(part.rhs for part in parts)), 2)
        return parts[0].with_arrays(lhs, rhs)

    return [parts[0] if len(parts) == 1 else join(parts) for parts in kinds if parts]


def _in_units(array: Array) -> tuple[Array, Array]:
    """Divides each example's array by its largest entry, in the width of norms."""
    wide = _leaves.widened(array)
    largest = jnp.max(jnp.abs(wide), tuple(range(1, array.ndim)), initial=0)
    unit = _range.finite_or_one(largest)
    return _moments.divided(wide, unit.reshape(-1, *[1] * (array.ndim - 1))), unit


def _scaled(part: Factors) -> tuple[Factors, Array]:
    rhs, unit = _in_units(part.rhs)
    if part.is_one_hot:
        return part.with_arrays(part.lhs, rhs), unit
    lhs, lhs_unit = _in_units(part.lhs)
    # The product of two units can be out of range although the gradient is not.
    product = jnp.maximum(unit * lhs_unit, np.finfo(unit.dtype).tiny)
    return part.with_arrays(lhs, rhs), product


_einsum: Callable[..., Array] = functools.partial(jnp.einsum, precision="highest")


def _inner(one: Any, other: Any) -> tuple[Array, Array]:
    """The inner product of two gradients for each example, with the sum of its parts' moduli."""
    if not isinstance(other, Factors):
        return _inner_with_constant(one, other)
    between_columns = _einsum("bnto,bnso->bnts", one.rhs, jnp.conj(other.rhs))
    if one.is_one_hot and other.is_one_hot:
        is_same = one.lhs[..., :, None] == other.lhs[..., None, :]
        is_inside = one.lhs[..., :, None] < one.rows
        return _summed(jnp.where(is_same & is_inside, between_columns, 0))
    if one.is_one_hot:
        # Looks up (examples, shared, s, rows) at the rows of each t.
        places = jnp.minimum(one.lhs, one.rows - 1)[..., None]
        looked_up = jnp.take_along_axis(jnp.swapaxes(other.lhs, 2, 3), places, 2)
        between_rows = jnp.where(one.lhs[..., None] < one.rows, jnp.conj(looked_up), 0)
    else:
        between_rows = _einsum("bnti,bnsi->bnts", one.lhs, jnp.conj(other.lhs))
    return _summed(between_rows * between_columns)


def _inner_with_constant(one: Any, constant: Array) -> tuple[Array, Array]:
    if not isinstance(one, Factors):
        return _summed(_leaves.squared_modulus(constant)[None])
    constant = jnp.conj(constant)
    if one.is_one_hot:
        places = jnp.minimum(one.lhs, one.rows - 1)
        rows = jax.vmap(jax.vmap(lambda block, index: block[index]), (None, 0))(constant, places)
        rows = jnp.where(one.lhs[..., None] < one.rows, rows, 0)
    else:
        rows = _einsum("bnti,nio->bnto", one.lhs, constant)
    return _summed(rows * one.rhs)


def _summed(products: Array) -> tuple[Array, Array]:
    products = jnp.real(products)  # Each is added to its conjugate.
    axes = tuple(range(1, products.ndim))
    return jnp.sum(products, axes), jnp.sum(jnp.abs(products), axes)


def made_norms(sums: Sequence[tuple[Sequence[Factors], Array | None]]) -> list[Array]:
    """The same norms as `gram_norms` for several sums, from gradients of one example at a time.

    They are made in one loop, because each loop takes a compiler long.
    """
    constants = [constant for _, constant in sums]

    def norms_of_one(example: Any) -> list[Array]:
        return [_made_norm(*each) for each in zip(example, constants, strict=True)]

    return list(jax.lax.map(norms_of_one, [list(factors) for factors, _ in sums]))


@jax.jit
def _made_norm(factors: Sequence[Factors], constant: Array | None) -> Array:
    alone = jax.tree.map(lambda array: array[None], factors)
    blocks = [_leaves.widened(each_product(part)) for part in alone]
    blocks += [] if constant is None else [_leaves.widened(constant)[None]]
    return row_norms_in_two_reads(functools.reduce(jnp.add, blocks))[0]
