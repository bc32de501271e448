"""Rules of primitives that make products.

The gradient of a weight is nearly always a sum of `lhs^T rhs`: of activations and the gradients
with respect to the layer's outputs.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from clipax.per_example._preparations import Grouped, Windows
from clipax.per_example._programs import shape_of
from clipax.per_example._roles import entries_of, roles
from clipax.per_example._rules._recipes import Recipe, Site, changed, finished, rule
from clipax.per_example._terms import Axis, Move, Operand, Product, Terms, Times


@rule("dot_general")
def _dot_general(site: Site) -> Recipe | None:
    lhs, rhs = site.operands
    (lhs_summed, rhs_summed), (lhs_batch, rhs_batch) = site.params["dimension_numbers"]
    lhs_axes, rhs_axes = axes_of(lhs), axes_of(rhs)
    for one, other in ((lhs_summed, rhs_summed), (lhs_batch, rhs_batch)):
        for left, right in zip(one, other, strict=True):
            rhs_axes[right] = lhs_axes[left]
    batch = [lhs_axes[axis] for axis in lhs_batch]
    free = [
        axis
        for axes, taken in (
            (lhs_axes, (*lhs_summed, *lhs_batch)),
            (rhs_axes, (*rhs_summed, *rhs_batch)),
        )
        for index, axis in enumerate(axes)
        if index not in taken
    ]
    one, other = site.scope.operand(lhs, lhs_axes), site.scope.operand(rhs, rhs_axes)
    out = (*batch, *free)
    found = product(site, one, other, out, precision=site.params["precision"])
    if found is None or (one.depends and other.depends):
        return finished(found)
    # It can be the gradient of a low-rank factor of a weight, from the gradient of the weight.
    index, axes, factor = (0, lhs_axes, other) if one.depends else (1, rhs_axes, one)

    def combine(terms: Terms) -> Terms | None:
        return changed(terms, lambda term: contracted(term, axes, factor, out)) or found

    return Recipe([site.origin(index)], combine)


def contracted(
    term: Product, axes: Sequence[Axis], factor: Operand, out: Sequence[Axis]
) -> Product | None:
    """Contracts a product with an array by one of its operands; None where that is no gain.

    Args:
      term: The product.
      axes: The axes by which the multiplication names those of the product.
      factor: The array.
      out: The axes of the result, which is summed over the others.
    """
    if term.moves or term.box is not None or term.one_hot is not None:
        return None
    if not (term.lhs.depends and term.rhs.depends):
        return None
    if not has_small_factors(term):
        return None
    own = dict(zip(axes, term.out, strict=True))
    gone = [own[axis] for axis in axes if axis not in out]
    for before, other in ((term.lhs, term.rhs), (term.rhs, term.lhs)):
        dropped = [axis for axis in gone if axis in before.axes and axis not in other.all_axes]
        if dropped:
            break
    else:
        return None
    factor = factor._replace(axes=tuple(own.get(axis, axis) for axis in factor.axes))
    more = (axis for axis in factor.axes if axis not in before.all_axes)
    after = (*(axis for axis in before.axes if axis not in dropped), *more)
    operand = multiplied(before, factor, after)
    term = term._replace(out=tuple(own.get(axis, axis) for axis in out))
    return term._replace(lhs=operand) if before is term.lhs else term._replace(rhs=operand)


def has_small_factors(term: Product) -> bool:
    """Whether the factors of a product are smaller than what the program makes of them."""
    made = {
        axis
        for each in (term.lhs, term.rhs)
        for axis in (*each.stacked, *(each.times[0].axes if each.times else each.axes))
    }
    made.difference_update(roles(term).summed)
    return entries_of(term) < math.prod(axis.size for axis in made)


def multiplied(operand: Operand, by: Operand, axes: Sequence[Axis]) -> Operand:
    """An operand with one factor more, which makes these axes."""
    return operand._replace(axes=tuple(axes), times=(*operand.times, Times(operand.axes, by)))


def product(
    site: Site, lhs: Operand, rhs: Operand, out: Sequence[Axis], **options: Any
) -> Terms | None:
    """A product of two operands, or None if there is no cheap way to its norm."""
    # A product of values that all examples share is made once, but for each step of a scan.
    depends = lhs.depends or rhs.depends or site.scope.is_in_steps
    return (Product(lhs, rhs, tuple(out), **options),) if depends else None


def axes_of(variable: Any) -> list[Axis]:
    return [Axis(size) for size in shape_of(variable)]


# Each entry of windows that overlap becomes a slice, and compilers are slow at more than this.
_LARGEST_WINDOW = 128


@rule("conv_general_dilated")
def _conv(site: Site) -> Recipe | None:
    """The gradient of a kernel: windows of the activations times the gradient of the result."""
    lhs, rhs = site.operands
    params = site.params
    numbers = params["dimension_numbers"]
    groups = params["batch_group_count"]
    inputs, outputs, results = (
        [shape_of(variable)[axis] for axis in spec]
        for variable, spec in zip(
            (lhs, rhs, site.variable),
            (numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec),
            strict=True,
        )
    )
    if params["feature_group_count"] != 1:
        return None
    group, row, column = Axis(groups), Axis(inputs[0] // groups), Axis(outputs[0] // groups)
    feature = Axis(inputs[1])
    window, places = ([Axis(size) for size in sizes[2:]] for sizes in (results, outputs))
    windows = Windows(
        tuple(numbers.lhs_spec),
        groups,
        tuple(results[2:]),
        tuple(outputs[2:]),
        *(tuple(params[name]) for name in ("window_strides", "padding")),
        *(tuple(params[name]) for name in ("lhs_dilation", "rhs_dilation")),
    )
    if math.prod(results[2:]) > _LARGEST_WINDOW and not windows.are_apart:
        return None
    grouped = Grouped(tuple(numbers.rhs_spec), groups)
    out = [*window, row, group, column]
    # Convolutions number their axes in this order: rows, columns, window.
    order = [len(window), len(window) + 1, *range(len(window))]
    moves = (
        Move("reshape", ((*results[2:], row.size, groups * column.size),)),
        Move("transpose", (tuple(order[int(axis)] for axis in np.argsort(numbers.out_spec)),)),
    )
    found = product(
        site,
        site.scope.operand(lhs, [feature, *places, *window, group, row], windows),
        site.scope.operand(rhs, [group, column, feature, *places], grouped),
        out,
        moves=moves,
        precision=params["precision"],
    )
    return finished(found)
