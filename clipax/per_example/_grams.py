"""Norms and sums of the gradients of many examples, from the factors of which they are made.

With `g = lhs^T rhs`, summed over t: `|g|^2 = sum((lhs lhs^T) * (rhs rhs^T))`, matrices of t x t.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _compat, _leaves, _range, _reduction
from clipax._core._typing import Array
from clipax.per_example._programs import Ref
from clipax.per_example._terms import Axis, Operand, Product

Values = dict[Ref, Array]
"""Of the program's variables; the examples come first, where a value differs between them."""


class Roles(NamedTuple):
    """What each axis of a product is."""

    shared: tuple[Axis, ...]
    """In both factors and in the result."""
    summed: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    """In `lhs` and in the result."""
    columns: tuple[Axis, ...]
    """In `rhs` and in the result."""
    others: tuple[Axis, ...]
    """In the result alone, of size one."""

    @property
    def sizes(self) -> "Sizes":
        return Sizes(*(math.prod(axis.size for axis in axes) for axes in self[:4]))


class Sizes(NamedTuple):
    shared: int
    summed: int
    rows: int
    columns: int

    @property
    def result(self) -> int:
        return self.shared * self.rows * self.columns


def roles(term: Product) -> Roles:
    lhs, rhs = set(term.lhs.all_axes), set(term.rhs.all_axes)
    steps = [axis for factor in term.factors for axis in factor.all_axes]
    lhs |= set(steps)
    rhs |= set(steps)
    if term.one_hot is not None:
        # Places cannot be added up: where only they have an axis, the updates are repeated.
        rhs |= lhs
        lhs |= {term.one_hot}
    out = set(term.out)
    seen = dict.fromkeys([*term.lhs.all_axes, *term.rhs.all_axes, *steps])
    return Roles(
        tuple(axis for axis in term.out if axis in lhs & rhs),
        tuple(axis for axis in seen if axis in lhs & rhs and axis not in out),
        tuple(axis for axis in term.out if axis in lhs - rhs),
        tuple(axis for axis in term.out if axis in rhs - lhs),
        tuple(axis for axis in term.out if axis not in lhs | rhs),
    )


def layout(term: Product) -> Any:
    """Equal for terms whose factors can be compared."""
    places = {axis: place for place, axis in enumerate(term.out)}
    found = roles(term)
    axes = [
        tuple(places[axis] for axis in group)
        for group in (found.shared, found.rows, found.columns)
    ]
    return (*axes, tuple(axis.size for axis in term.out), term.moves)


def turned(term: Product) -> Product:
    """The product with its factors the other way round."""
    return term._replace(lhs=term.rhs, rhs=term.lhs)


# -- Factors -------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """The two factors for all examples: (examples, shared, summed, rows or columns)."""

    lhs: Array
    """Or, of a one-hot one, the places: (examples, shared, summed)."""
    rhs: Array
    rows: int
    is_one_hot: bool
    precision: Any

    def widened(self, dtype: Any) -> "Factors":
        lhs = self.lhs if self.is_one_hot else self.lhs.astype(dtype)
        return self._replace(lhs=lhs, rhs=self.rhs.astype(dtype))


def factors(term: Product, values: Values, examples: int) -> Factors:
    found = roles(term)
    sizes = found.sizes
    lead = (examples, sizes.shared, sizes.summed)
    inner = (*found.shared, *found.summed)
    rhs = _arranged(term.rhs, values, examples, (*inner, *found.columns))
    if term.factors or term.scale != 1:
        # A factor for a gradient in float32 can be out of range for operands in float16.
        rhs = _scaled_by(term.scale, _leaves.widened(rhs))
    for factor in term.factors:
        by = _arranged(factor, values, examples, inner)
        rhs = rhs * by.reshape(by.shape + (1,) * (rhs.ndim - by.ndim)).astype(rhs.dtype)
    columns = rhs.reshape(*lead, sizes.columns)
    if term.one_hot is not None:
        places = _arranged(term.lhs, values, examples, inner).reshape(lead)
        return Factors(places, columns, term.one_hot.size, True, None)
    lhs = _arranged(term.lhs, values, examples, (*inner, *found.rows))
    columns, lhs = _of_one_dtype(columns, lhs)
    return Factors(lhs.reshape(*lead, sizes.rows), columns, sizes.rows, False, term.precision)


def _scaled_by(scale: float, array: Array) -> Array:
    """Multiplies an array by a number that may be out of the range of its dtype."""
    step = 2.0**96
    while abs(scale) > step or 0 < abs(scale) < 1 / step:
        by = step if abs(scale) > step else 1 / step
        # The barrier keeps XLA from multiplying the numbers by each other first.
        array = _compat.optimization_barrier(array * jnp.asarray(by, array.dtype))
        scale = np.clip(scale, -sys.float_info.max, sys.float_info.max) / by
    return array * jnp.asarray(scale, array.dtype)


def _of_one_dtype(*arrays: Array) -> list[Array]:
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) == 1:
        return list(arrays)
    wide = _leaves.wide_dtype(*dtypes)
    return [array.astype(wide) for array in arrays]


def _arranged(operand: Operand, values: Values, examples: int, wanted: Sequence[Axis]) -> Array:
    """An operand with the examples and the wanted axes.

    Over axes that are not wanted it is summed, along those that it has not it is repeated.
    """
    value = values[operand.ref]
    prepared = (
        jax.vmap(operand.prepared)(value)
        if operand.depends
        else operand.prepared(jnp.asarray(value))[None]
    )
    axes = list(operand.all_axes)
    dropped = [index + 1 for index, axis in enumerate(axes) if axis not in wanted]
    if dropped:
        prepared = jnp.sum(prepared, axis=tuple(dropped))
        axes = [axis for axis in axes if axis in wanted]
    present = [axis for axis in wanted if axis in axes]
    order = [0, *(axes.index(axis) + 1 for axis in present)]
    prepared = jnp.transpose(prepared, order)
    shape = [axis.size if axis in axes else 1 for axis in wanted]
    prepared = prepared.reshape(prepared.shape[0], *shape)
    return jnp.broadcast_to(prepared, (examples, *(axis.size for axis in wanted)))


def assembled(term: Product, block: Array) -> Array:
    """A product of (shared, rows, columns) in the shape of the gradient."""
    found = roles(term)
    axes = (*found.shared, *found.rows, *found.columns, *found.others)
    block = block.reshape([axis.size for axis in axes])
    block = jnp.transpose(block, [axes.index(axis) for axis in term.out])
    for move in term.moves:
        block = move(block)
    return block


def taken_apart(term: Product, gradient: Array) -> Array:
    """An array in the shape of the gradient as (shared, rows, columns)."""
    sizes = roles(term).sizes
    zeros = jnp.zeros((sizes.shared, sizes.rows, sizes.columns), gradient.dtype)
    zeros = _compat.varying_like(zeros, gradient)
    # It only moves entries, and its transpose moves them back.
    (block,) = jax.linear_transpose(lambda block: assembled(term, block), zeros)(gradient)
    return block


def rest_of(term: Product, gradient: Array, block: Array) -> Array | None:
    """Returns the entries of a gradient that its block lacks, or None if it lacks none."""
    if block.size == gradient.size:
        return None
    # A difference would make NaN of inf - inf.
    return jnp.where(assembled(term, block) == gradient, 0, gradient)


# -- Norms ---------------------------------------------------------------------------------------


def row_norms(array: Array) -> Array:
    """The norm of each example's array."""
    array = array.reshape(array.shape[0], math.prod(array.shape[1:]))
    rows = _reduction.Layout((1,), ())
    return _reduction.separate_norms([array], (rows,), 2.0)[0][:, 0]


def with_rest(norms: Array, rest: Array | None) -> Array:
    """Completes the norms of blocks by a rest that all examples share."""
    if rest is None:
        return norms
    beside = jnp.broadcast_to(row_norms(rest[None]), norms.shape).astype(norms.dtype)
    return row_norms(jnp.stack([norms, beside], 1))


def outer_norms(parts: Factors) -> Array:
    """Of products that sum over nothing: the two norms, multiplied."""
    if parts.is_one_hot:
        return _factor_norms(jnp.where(parts.lhs[..., None] < parts.rows, parts.rhs, 0))
    return _factor_norms(parts.lhs) * _factor_norms(parts.rhs)


def _factor_norms(array: Array) -> Array:
    # Twice read, but with no branch, which would keep a copy for itself: factors are small.
    scaled, unit = _in_units(array.reshape(array.shape[0], math.prod(array.shape[1:])))
    return unit * jnp.sqrt(jnp.sum(scaled * scaled, 1))


# A sum that came to less than this share of its parts has lost too many digits.
_LEAST_SHARE = 2.0**-10


def gram_norms(terms: Sequence[Factors], constant: Array | None) -> tuple[Array, Array]:
    """The norm of each example's sum of products, and of what is added to each alike.

    And whether it is exact enough: not where the products nearly cancel.
    """
    scaled: list[tuple[Any, Array]] = [_scaled(part) for part in _joined(terms)]
    if constant is not None:
        constant, unit = _in_units(constant[None])
        scaled.append((constant[0], jnp.broadcast_to(unit, scaled[0][1].shape)))
    largest = functools.reduce(jnp.maximum, [unit for _, unit in scaled])
    total = parts = jnp.zeros_like(largest)
    for (one, unit), (other, other_unit) in itertools.combinations_with_replacement(scaled, 2):
        inner, moduli = _inner(one, other)
        share = (unit / largest) * (other_unit / largest) * (1 if one is other else 2)
        total, parts = total + share * inner, parts + share * moduli
    # What is nearly zero may come out below it.
    norms = largest * jnp.sqrt(jnp.maximum(total, 0))
    return norms, ~(total < _LEAST_SHARE * parts)


def _joined(terms: Sequence[Factors]) -> list[Factors]:
    """Terms of a kind as one, by their summed axes one after the other."""
    kinds = [[term for term in terms if term.is_one_hot is kind] for kind in (True, False)]

    def join(parts: list[Factors]) -> Factors:
        lhs = jnp.concatenate(_of_one_dtype(*(part.lhs for part in parts)), 2)
        rhs = jnp.concatenate(_of_one_dtype(*(part.rhs for part in parts)), 2)
        return parts[0]._replace(lhs=lhs, rhs=rhs)

    return [parts[0] if len(parts) == 1 else join(parts) for parts in kinds if parts]


def _in_units(array: Array) -> tuple[Array, Array]:
    """An example's array over its largest entry, in the width of norms, and that entry."""
    wide = array.astype(_leaves.wide_dtype(array.dtype))
    largest = jnp.max(jnp.abs(wide), tuple(range(1, array.ndim)), initial=0)
    unit = _range.finite_or_one(largest)
    return wide / unit.reshape(-1, *[1] * (array.ndim - 1)), unit


def _scaled(part: Factors) -> tuple[Factors, Array]:
    rhs, unit = _in_units(part.rhs)
    if part.is_one_hot:
        return part._replace(rhs=rhs), unit
    lhs, lhs_unit = _in_units(part.lhs)
    # A gradient in range can have factors whose units are not, once multiplied.
    return part._replace(lhs=lhs, rhs=rhs), jnp.maximum(unit * lhs_unit, np.finfo(unit.dtype).tiny)


_einsum: Callable[..., Array] = functools.partial(jnp.einsum, precision="highest")


def _inner(one: Any, other: Any) -> tuple[Array, Array]:
    """The inner product of two terms, for each example, and the sum of its parts' moduli."""
    if not isinstance(other, Factors):
        return _inner_with_constant(one, other)
    between_columns = _einsum("bnto,bnso->bnts", one.rhs, other.rhs)
    if one.is_one_hot and other.is_one_hot:
        is_same = one.lhs[..., :, None] == other.lhs[..., None, :]
        is_inside = one.lhs[..., :, None] < one.rows
        return _summed(jnp.where(is_same & is_inside, between_columns, 0))
    if one.is_one_hot:
        # (examples, shared, s, rows) at the places of t.
        places = jnp.minimum(one.lhs, one.rows - 1)[..., None]
        looked_up = jnp.take_along_axis(jnp.swapaxes(other.lhs, 2, 3), places, 2)
        between_rows = jnp.where(one.lhs[..., None] < one.rows, looked_up, 0)
    else:
        between_rows = _einsum("bnti,bnsi->bnts", one.lhs, other.lhs)
    return _summed(between_rows * between_columns)


def _inner_with_constant(one: Any, constant: Array) -> tuple[Array, Array]:
    if not isinstance(one, Factors):
        return _summed((one * constant)[None])
    if one.is_one_hot:
        places = jnp.minimum(one.lhs, one.rows - 1)
        rows = jax.vmap(jax.vmap(lambda block, index: block[index]), (None, 0))(constant, places)
        rows = jnp.where(one.lhs[..., None] < one.rows, rows, 0)
    else:
        rows = _einsum("bnti,nio->bnto", one.lhs, constant)
    return _summed(rows * one.rhs)


def _summed(products: Array) -> tuple[Array, Array]:
    axes = tuple(range(1, products.ndim))
    return jnp.sum(products, axes), jnp.sum(jnp.abs(products), axes)


def made_norms(terms: Sequence[Factors], constant: Array | None) -> Array:
    """As `gram_norms`, by making the gradients, one example after the other."""

    def norm_of_one(pairs: list[tuple[Array, Array]]) -> Array:
        blocks = [
            _leaves.widened(each_product(part._replace(lhs=lhs[None], rhs=rhs[None])))
            for part, (lhs, rhs) in zip(terms, pairs, strict=True)
        ]
        blocks += [] if constant is None else [_leaves.widened(constant)[None]]
        return row_norms(functools.reduce(jnp.add, blocks))[0]

    return jax.lax.map(norm_of_one, [(part.lhs, part.rhs) for part in terms])


# -- Sums ----------------------------------------------------------------------------------------


def each_product(parts: Factors) -> Array:
    """Every example's product: (examples, shared, rows, columns)."""
    if parts.is_one_hot:
        return jax.vmap(functools.partial(_placed, parts.rows))(parts.lhs, parts.rhs)
    return jnp.einsum("bnti,bnto->bnio", parts.lhs, parts.rhs, precision=parts.precision)


def weighted_product(parts: Factors, weights: Sequence[Array]) -> Array:
    """The weighted sum of the examples' products, none of which is made.

    A weight is a product itself, since one float cannot hold a very small one.
    """
    wide = _leaves.wide_dtype(parts.rhs.dtype)
    # The range of bfloat16 is that of float32, and its products are fast.
    narrow = parts.rhs.dtype if parts.rhs.dtype == jnp.bfloat16 else wide
    rhs = parts.rhs.astype(wide)
    for weight in weights:
        rhs = rhs * weight.astype(wide)[:, None, None, None]
    rhs = rhs.astype(narrow)
    if parts.is_one_hot:
        return _placed(
            parts.rows, _one_after_the_other(parts.lhs), _one_after_the_other(rhs.astype(wide))
        )
    subscripts = "bnti,bnto->nio"
    lhs = parts.lhs.astype(narrow)
    if lhs.shape[1] == 1:
        # As the product of two matrices, like the gradient of the batch itself.
        lhs, rhs = (array.reshape(-1, array.shape[-1]) for array in (lhs, rhs))
        subscripts = "ti,to->io"
    return jnp.einsum(subscripts, lhs, rhs, precision=parts.precision, preferred_element_type=wide)


def _one_after_the_other(array: Array) -> Array:
    """(examples, shared, summed, ...) as (shared, examples * summed, ...)."""
    array = jnp.swapaxes(array, 0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])


def _placed(rows: int, places: Array, updates: Array) -> Array:
    """Adds (shared, summed, columns) up at their places; outside of all rows, nowhere."""

    def one(places: Array, updates: Array) -> Array:
        zeros = jnp.zeros((rows, updates.shape[-1]), updates.dtype)
        return zeros.at[places].add(updates, mode="drop")

    return jax.vmap(one)(places, updates)
