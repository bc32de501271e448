"""The rules that find the products of which gradients are made.

The gradient of a weight is nearly always a sum of `lhs^T rhs`: of activations and of what
flows back to them. Walked back from a gradient, the program tells them, through whatever
only moves, adds or scales entries.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clipax.per_example import _programs, _walk
from clipax.per_example._preparations import Cut, Grouped, Pad, Place, Squeezed, Windows
from clipax.per_example._programs import is_variable, shape_of
from clipax.per_example._terms import (
    Axis,
    Move,
    Operand,
    Origin,
    Passed,
    Product,
    Scope,
    Term,
    Terms,
)
from clipax.per_example._walk import Recipe, Site, changed, each, made, rule, total

terms_of = _walk.terms_of


# -- What makes products -------------------------------------------------------------------------


@rule("dot_general")
def _dot_general(site: Site) -> Recipe | None:
    lhs, rhs = site.operands
    (lhs_summed, rhs_summed), (lhs_batch, rhs_batch) = site.params["dimension_numbers"]
    lhs_axes, rhs_axes = _axes_of(lhs), _axes_of(rhs)
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
    product = _product(
        site.scope.operand(lhs, lhs_axes),
        site.scope.operand(rhs, rhs_axes),
        (*batch, *free),
        precision=site.params["precision"],
    )
    return made(product)


def _product(lhs: Operand, rhs: Operand, out: Sequence[Axis], **options: Any) -> Terms | None:
    depends = lhs.depends or rhs.depends
    is_real = not any(
        jnp.issubdtype(operand.ref.variable.aval.dtype, np.complexfloating)
        for operand in (lhs, rhs)
    )
    return (Product(lhs, rhs, tuple(out), **options),) if depends and is_real else None


def _axes_of(variable: Any) -> list[Axis]:
    return [Axis(size) for size in shape_of(variable)]


@rule("scatter-add", "scatter_add")
def _scatter_add(site: Site) -> Recipe | None:
    """Of look-ups: updates times the rows of a matrix of zeros and ones."""
    operand, indices, updates = site.operands
    numbers, mode = site.params["dimension_numbers"], site.params["mode"]
    places = numbers.scatter_dims_to_operand_dims
    window = numbers.update_window_dims
    if len(places) != 1 or numbers.inserted_window_dims != places:
        return None
    if numbers.operand_batching_dims:
        return None
    (place,) = places
    out = _axes_of(operand)
    rest = [axis for index, axis in enumerate(out) if index != place]
    update_axes = _axes_of(updates)
    if [update_axes[index].size for index in window] != [axis.size for axis in rest]:
        return None
    for index, axis in zip(window, rest, strict=True):
        update_axes[index] = axis
    looked_up = [axis for index, axis in enumerate(update_axes) if index not in window]
    tells = site.scope.operand(
        indices, looked_up, Squeezed(-1), Place(out[place].size, _is_clipped(mode))
    )
    new = _product(tells, site.scope.operand(updates, update_axes), out, one_hot=out[place])
    if new is None:
        return None
    return Recipe([site.origin(0)], lambda terms: total(site, [(terms, 1.0), (new, 1.0)]))


def _is_clipped(mode: Any) -> bool:
    return jax.lax.GatherScatterMode.from_any(mode) == jax.lax.GatherScatterMode.CLIP


@rule("dynamic_update_slice")
def _dynamic_update_slice(site: Site) -> Recipe | None:
    """Of a look-up of one row, at a place that is known only when it is computed."""
    operand, update, *starts = site.operands
    out, update_axes = _axes_of(operand), _axes_of(update)
    smaller = [
        index
        for index, (one, other) in enumerate(zip(out, update_axes, strict=True))
        if one.size != other.size
    ]
    if len(smaller) != 1 or update_axes[smaller[0]].size != 1:
        return None
    (place,) = smaller
    rest = [axis for index, axis in enumerate(out) if index != place]
    tells = site.scope.operand(starts[place], (), Place(out[place].size, is_clipped=True))
    row = site.scope.operand(update, rest, Squeezed(place))
    new = _product(tells, row, out, one_hot=out[place])
    # The row replaces other entries, which must be zero.
    return Recipe([site.origin(0)], lambda terms: None if terms else new)


# More than this many entries of a window would be more slices than a compiler likes.
_LARGEST_WINDOW = 128


@rule("conv_general_dilated")
def _conv(site: Site) -> Recipe | None:
    """Of kernels: windows of the activations times what flows back."""
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
    if params["feature_group_count"] != 1 or math.prod(results[2:]) > _LARGEST_WINDOW:
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
    grouped = Grouped(tuple(numbers.rhs_spec), groups)
    out = [*window, row, group, column]
    # As a convolution numbers them: rows, columns, window.
    order = [len(window), len(window) + 1, *range(len(window))]
    moves = (
        Move("reshape", ((*results[2:], row.size, groups * column.size),)),
        Move("transpose", (tuple(order[int(axis)] for axis in np.argsort(numbers.out_spec)),)),
    )
    product = _product(
        site.scope.operand(lhs, [feature, *places, *window, group, row], windows),
        site.scope.operand(rhs, [group, column, feature, *places], grouped),
        out,
        moves=moves,
        precision=params["precision"],
    )
    return made(product)


# -- What keeps them -----------------------------------------------------------------------------


@rule("rev")
def _rev(site: Site) -> Recipe:
    move = Move("rev", (tuple(site.params["dimensions"]),))
    return each(site.origin(0), lambda term: _moved(term, move))


def _moved(term: Product, move: Move) -> Product:
    return term._replace(moves=move.after(term.moves))


@rule("transpose")
def _transpose(site: Site) -> Recipe:
    permutation = tuple(map(int, site.params["permutation"]))

    def change(term: Product) -> Product:
        if term.moves:
            return _moved(term, Move("transpose", (permutation,)))
        return term._replace(out=tuple(term.out[axis] for axis in permutation))

    return each(site.origin(0), change)


@rule("reshape")
def _reshape(site: Site) -> Recipe | None:
    is_permuted = site.params["dimensions"] is not None
    return None if is_permuted else _in_the_new_shape(site)


@rule("squeeze")
def _in_the_new_shape(site: Site) -> Recipe:
    shape = shape_of(site.variable)
    return each(site.origin(0), lambda term: _reshaped(term, shape))


def _reshaped(term: Product, shape: tuple[int, ...]) -> Product:
    longer = [axis for axis in term.out if axis.size != 1]
    if term.moves or [axis.size for axis in longer] != [size for size in shape if size != 1]:
        return _moved(term, Move("reshape", (shape,)))
    # Only axes of size one come and go.
    rest = iter(longer)
    return term._replace(out=tuple(next(rest) if size != 1 else Axis(1) for size in shape))


@rule("broadcast_in_dim")
def _broadcast(site: Site) -> Recipe | None:
    before, after = shape_of(site.operands[0]), shape_of(site.variable)
    if math.prod(before) == math.prod(after):
        return _in_the_new_shape(site)
    # Zero has no terms, and stays zero.
    return each(site.origin(0), lambda _: None)


@rule("reduce_sum")
def _reduce_sum(site: Site) -> Recipe:
    summed = site.params["axes"]

    def change(term: Product) -> Product | None:
        if term.moves or term.one_hot in [term.out[axis] for axis in summed]:
            return None
        kept = [axis for index, axis in enumerate(term.out) if index not in summed]
        return term._replace(out=tuple(kept))

    return each(site.origin(0), change)


@rule("pad")
def _pad(site: Site) -> Recipe | None:
    config = [tuple(map(int, edges)) for edges in site.params["padding_config"]]
    shape = shape_of(site.operands[0])
    cuts = [
        (max(-low, 0), size - max(-high, 0), 1)
        for (low, high, _), size in zip(config, shape, strict=True)
    ]
    edges = [(max(low, 0), max(high, 0), step) for low, high, step in config]
    rows = zip(cuts, shape, edges, strict=True)
    if any(step and cut != (0, size, 1) for cut, size, (_, _, step) in rows):
        return None

    def change(term: Product) -> Product | None:
        cut = _cut(term, cuts, shape)
        return None if cut is None else _padded(cut, edges)

    def combine(terms: Terms, filling: Terms) -> Terms | None:
        return None if filling else changed(terms, change)

    return Recipe([site.origin(0), site.origin(1)], combine)


def _padded(term: Product, edges: Sequence[tuple[int, ...]]) -> Product:
    positions = [position for position, each in enumerate(edges) if any(each)]
    is_of_factors = not term.moves and all(_has_factors(term, position) for position in positions)
    if not is_of_factors:
        return _moved(term, Move("pad", tuple(edges)))
    for position in positions:
        low, high, step = edges[position]
        size = term.out[position].size
        new = Axis(low + high + size + max(0, size - 1) * step)
        term = _changed_along(term, position, new, Pad, edges[position])
    return term


@rule("slice")
def _slice(site: Site) -> Recipe:
    params = site.params
    strides = params["strides"] or [1] * len(params["start_indices"])
    cuts = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    shape = shape_of(site.operands[0])
    return each(site.origin(0), lambda term: _cut(term, cuts, shape))


@rule("split")
def _split(site: Site) -> Recipe:
    axis, sizes = site.params["axis"], site.params["sizes"]
    shape = shape_of(site.operands[0])
    start = sum(sizes[: site.position])
    cuts = [(0, size, 1) for size in shape]
    cuts[axis] = (start, start + sizes[site.position], 1)
    return each(site.origin(0), lambda term: _cut(term, cuts, shape))


@rule("concatenate")
def _concatenate(site: Site) -> Recipe:
    axis = site.params["dimension"]
    sizes = [shape_of(operand)[axis] for operand in site.operands]

    def combine(*parts: Terms) -> Terms | None:
        found: list[Term] = []
        start = 0
        for terms, size in zip(parts, sizes, strict=True):
            edges = [(0, 0, 0)] * len(shape_of(site.variable))
            edges[axis] = (start, sum(sizes) - start - size, 0)
            start += size
            padded = changed(terms, functools.partial(_padded, edges=edges))
            if padded is None:
                return None
            found += padded
        return tuple(found)

    return Recipe([site.origin(index) for index in range(len(sizes))], combine)


def _cut(
    term: Product, cuts: Sequence[tuple[int, int, int]], shape: tuple[int, ...]
) -> Product | None:
    """A part of a product, by parts of its factors."""
    for position, (cut, size) in enumerate(zip(cuts, shape, strict=True)):
        if cut == (0, size, 1):
            continue
        if term.moves or not _has_factors(term, position):
            return None
        term = _changed_along(term, position, Axis(len(range(*cut))), Cut, cut)
    return term


def _has_factors(term: Product, position: int) -> bool:
    """Whether an axis of a product is one of its factors, which can be changed along it."""
    axis = term.out[position]
    operands = [each for each in (term.lhs, term.rhs) if axis in each.all_axes]
    return bool(operands) and all(axis in each.axes for each in operands)


def _changed_along(term: Product, position: int, new: Axis, kind: Any, how: Any) -> Product:
    old = term.out[position]

    def change(operand: Operand) -> Operand:
        if old not in operand.axes:
            return operand
        return operand._replace(
            axes=tuple(new if axis is old else axis for axis in operand.axes),
            preparations=(*operand.preparations, kind(operand.axes.index(old), how)),
        )

    out = tuple(new if axis is old else axis for axis in term.out)
    return term._replace(lhs=change(term.lhs), rhs=change(term.rhs), out=out)


@rule("mul")
def _mul(site: Site) -> Recipe | None:
    pairs = [(site.origin(index), site.scope.number(site.operands[1 - index])) for index in (0, 1)]
    scaled = [(place, number) for place, number in pairs if number is not None]

    def combine(*found: Terms) -> Terms | None:
        products = (
            _scaled(terms, number) for terms, (_, number) in zip(found, scaled, strict=True)
        )
        return next((terms for terms in products if terms is not None), None)

    return Recipe([place for place, _ in scaled], combine)


@rule("div")
def _div(site: Site) -> Recipe | None:
    number = site.scope.number(site.operands[1])
    if number is None:
        return None
    return Recipe([site.origin(0)], lambda terms: _scaled(terms, number, jnp.reciprocal))


def _scaled(terms: Terms, number: Origin, *preparations: Any) -> Terms | None:
    """Multiplies terms by a number."""
    scale = _constant(number[1], *preparations)
    if scale is not None:
        return changed(terms, lambda term: term._replace(scale=term.scale * scale))
    if not terms:
        # Zero times a number that may be infinite is not always zero.
        return None
    scope, atom = number
    factor = scope.operand(atom, (), *preparations)
    return changed(terms, lambda term: term._replace(factors=(*term.factors, factor)))


def _constant(atom: Any, *preparations: Any) -> float | None:
    """Returns the value of a number, or of its reciprocal, if the program states it."""
    is_real = jnp.issubdtype(atom.aval.dtype, np.floating)
    if is_variable(atom) or not is_real or not np.isfinite(value := float(atom.val)):
        return None
    if not preparations:
        return value
    return 1 / value if value else None


@rule("neg")
def _neg(site: Site) -> Recipe:
    return each(site.origin(0), lambda term: term._replace(scale=-term.scale))


@rule("convert_element_type")
def _cast(site: Site) -> Recipe | None:
    # The sum is cast in the end, and a norm is taken of what was not rounded.
    is_float = jnp.issubdtype(site.params["new_dtype"], np.floating)
    return each(site.origin(0), lambda term: term) if is_float else None


# -- Scans ---------------------------------------------------------------------------------------


@rule("scan")
def _scan(site: Site) -> Recipe | None:
    body = _programs.body_of(site.equation)
    if body is None:
        return None
    layout = _programs.scan_layout(site.equation, body)
    inside = site.scope.inside(site.equation, body)
    step = Axis(site.params["length"])
    places = [inside.origin(body.program.outvars[site.position])]
    is_carried = site.position < layout.carries
    if is_carried:
        places.append(site.origin(layout.consts + site.position))

    def combine(terms: Terms, start: Terms = ()) -> Terms | None:
        passed = [term.position for term in terms if isinstance(term, Passed)]
        products = [term for term in terms if isinstance(term, Product)]
        if len(products) + len(passed) < len(terms):
            return None
        # The sum of a term over the steps, if nothing else is done to what is carried.
        if passed != ([layout.consts + site.position] if is_carried else []):
            return None
        lift = _lifted(site, inside, layout, step)
        lifted = tuple(_with_operands(term, lift) for term in products)
        if is_carried:
            return total(site, [(start, 1.0), (lifted, 1.0)])
        return tuple(
            term._replace(
                out=(step, *term.out), moves=tuple(Move("mapped", move) for move in term.moves)
            )
            for term in lifted
        )

    return Recipe(places, combine)


def _lifted(
    site: Site, inside: Scope, layout: _programs.ScanLayout, step: Axis
) -> Callable[[Operand], Operand]:
    """Returns a function that turns an operand of one step into that of all steps."""
    first_scanned = layout.consts + layout.carries

    def lift(operand: Operand) -> Operand:
        path, variable = operand.ref
        if not is_variable(variable):
            return operand
        index = inside.inputs.get(variable) if path == inside.path else None
        if index is None or layout.consts <= index < first_scanned:
            return operand._replace(stacked=(step, *operand.stacked))
        operand = site.scope.naming(operand, site.operands[index])
        return (
            operand
            if index < layout.consts
            else operand._replace(stacked=(step, *operand.stacked))
        )

    return lift


def _with_operands(term: Product, change: Callable[[Operand], Operand]) -> Product:
    return term._replace(
        lhs=change(term.lhs), rhs=change(term.rhs), factors=tuple(map(change, term.factors))
    )
