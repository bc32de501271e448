"""The two factors of a product, for all examples."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax._core import _compat, _leaves
from clipax._core._typing import Array
from clipax.per_example._programs import Values
from clipax.per_example._roles import Assembly, assembly_of, roles
from clipax.per_example._terms import Axis, Operand, Product, mapped


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["lhs", "rhs"],
    meta_fields=["rows", "is_one_hot", "precision", "assembly"],
)
@dataclasses.dataclass(frozen=True)
class Factors:
    """Arrays `lhs` and `rhs`: (examples, shared, summed, rows or columns)."""

    lhs: Array
    """If `is_one_hot`, the rows of its ones instead: (examples, shared, summed)."""
    rhs: Array
    rows: int
    is_one_hot: bool
    precision: Any
    assembly: Assembly
    """What makes a gradient of the product."""

    def with_arrays(self, lhs: Array, rhs: Array) -> "Factors":
        return dataclasses.replace(self, lhs=lhs, rhs=rhs)

    def widened(self, dtype: Any) -> "Factors":
        lhs = self.lhs if self.is_one_hot else _leaves.widened(self.lhs, dtype)
        return self.with_arrays(lhs, _leaves.widened(self.rhs, dtype))


def factors_of(term: Product, values: Values, examples: int) -> Factors:
    """Arranges the operands of a product for all examples."""
    found = roles(term)
    sizes = found.sizes
    lead = (examples, sizes.shared, sizes.summed)
    inner = (*found.shared, *found.summed)
    rhs = _arranged(term.rhs, values, examples, (*inner, *found.columns))
    if term.scalars or term.scale != 1:
        # A number that scales a gradient in float32 can be out of range for operands in float16.
        rhs = _scaled_by(term.scale, _leaves.widened(rhs))
    for scalar in term.scalars:
        by = _arranged(scalar, values, examples, inner)
        rhs = rhs * by.reshape(by.shape + (1,) * (rhs.ndim - by.ndim)).astype(rhs.dtype)
    columns = rhs.reshape(*lead, sizes.columns)
    if term.one_hot is not None:
        places = _arranged(term.lhs, values, examples, inner).reshape(lead)
        return Factors(places, columns, term.one_hot.size, True, None, assembly_of(term))
    lhs = _arranged(term.lhs, values, examples, (*inner, *found.rows))
    columns, lhs = of_one_dtype(columns, lhs)
    lhs = lhs.reshape(*lead, sizes.rows)
    return Factors(lhs, columns, sizes.rows, False, term.precision, assembly_of(term))


def _scaled_by(scale: float, array: Array) -> Array:
    """Multiplies an array by a number that can be out of the range of its dtype."""
    step = 2.0**96
    while abs(scale) > step or 0 < abs(scale) < 1 / step:
        by = step if abs(scale) > step else 1 / step
        # Without a barrier, XLA would multiply the numbers by each other first.
        array = _compat.optimization_barrier(array * jnp.asarray(by, array.dtype))
        scale = np.clip(scale, -sys.float_info.max, sys.float_info.max) / by
    return array * jnp.asarray(scale, array.dtype)


def of_one_dtype(*arrays: Array) -> list[Array]:
    dtypes = {array.dtype for array in arrays}
    if len(dtypes) == 1:
        return list(arrays)
    wide = np.result_type(*(_leaves.widened_dtype(dtype, *dtypes) for dtype in dtypes))
    return [array.astype(wide) for array in arrays]


def _arranged(operand: Operand, values: Values, examples: int, wanted: Sequence[Axis]) -> Array:
    """An operand with an axis of examples, then the wanted axes.

    It is summed over axes that are not wanted, and repeated along wanted axes that it lacks.
    """
    prepared = _prepared(operand, values)
    axes = list(operand.all_axes)
    dropped = [index + 1 for index, axis in enumerate(axes) if axis not in wanted]
    if dropped:
        prepared = jnp.sum(prepared, axis=tuple(dropped))
        axes = [axis for axis in axes if axis in wanted]
    present = [axis for axis in wanted if axis in axes]
    order = [0, *(axes.index(axis) + 1 for axis in present)]
    shape = [axis.size if axis in axes else 1 for axis in wanted]
    prepared = jax.lax.transpose(prepared, order).reshape(prepared.shape[0], *shape)
    whole = (examples, *(axis.size for axis in wanted))
    return prepared if prepared.shape == whole else jnp.broadcast_to(prepared, whole)


def _prepared(operand: Operand, values: Values) -> Array:
    """An operand with an axis of examples, which has size one if all share it."""
    prepared = jnp.asarray(values[operand.ref])
    if operand.preparations:
        prepared = mapped(operand.prepared, operand.depends)(prepared)
    if not operand.depends:
        prepared = prepared[None]
    axes_after = [*(factor.axes for factor in operand.times), operand.axes][1:]
    for factor, after in zip(operand.times, axes_after, strict=True):
        prepared = _multiplied(
            prepared,
            (*operand.stacked, *factor.axes),
            _prepared(factor.by, values),
            factor.by.all_axes,
            (*operand.stacked, *after),
        )
    return prepared


def _multiplied(
    one: Array, axes: Sequence[Axis], other: Array, other_axes: Sequence[Axis], out: Sequence[Axis]
) -> Array:
    """The product of arrays whose axes are named after the first one, that of examples."""
    names = {axis: place for place, axis in enumerate({*axes, *other_axes})}
    examples = len(names)
    subscripts = [[examples, *map(names.__getitem__, each)] for each in (axes, other_axes, out)]
    one, other = of_one_dtype(one, other)
    # What a narrow type holds of the whole product need not fit it here.
    wide = _leaves.widened_dtype(one.dtype)
    return jnp.einsum(
        one, subscripts[0], other, subscripts[1], subscripts[2], preferred_element_type=wide
    )


def each_product(parts: Factors) -> Array:
    """The block of each example: (examples, shared, rows, columns)."""
    if parts.is_one_hot:
        return jax.vmap(functools.partial(_placed, parts.rows))(parts.lhs, parts.rhs)
    return jnp.einsum("bnti,bnto->bnio", parts.lhs, parts.rhs, precision=parts.precision)


def weighted_product(parts: Factors, weights: Sequence[Array]) -> Array:
    """The weighted sum of the blocks of all examples, none of which is made.

    Each weight is the product of several numbers, because one float cannot hold a very small one.
    """
    wide = _leaves.widened_dtype(parts.rhs.dtype)
    # bfloat16 has the range of float32, and its products are fast.
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
        # One product of two matrices, as for the gradient of the whole batch.
        lhs, rhs = (array.reshape(-1, array.shape[-1]) for array in (lhs, rhs))
        subscripts = "ti,to->io"
    return jnp.einsum(subscripts, lhs, rhs, precision=parts.precision, preferred_element_type=wide)


def _one_after_the_other(array: Array) -> Array:
    """Reshapes (examples, shared, summed, ...) to (shared, examples * summed, ...)."""
    array = jnp.swapaxes(array, 0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])


def _placed(rows: int, places: Array, updates: Array) -> Array:
    """Adds updates (shared, summed, columns) to rows. Those outside all rows are dropped."""

    def one(places: Array, updates: Array) -> Array:
        zeros = jnp.zeros((rows, updates.shape[-1]), updates.dtype)
        return zeros.at[places].add(updates, mode="drop")

    return jax.vmap(one)(places, updates)
