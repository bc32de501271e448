"""Finds the products of which gradients are made, without making them.

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

from clipax import _programs
from clipax._preparations import Cut, Grouped, Pad, Place, Squeezed, Windows
from clipax._programs import Body, Equation, Literal, is_variable, shape_of
from clipax._terms import Axis, Move, Operand, Passed, Product, Scope, Term, Terms, Whole


def terms_of(scope: Scope, variable: Any) -> Terms:
    """The terms that add up to a variable. None of them is zero."""
    found: list[Term] = []
    pending = [(scope, variable)]
    while pending:
        here, current = pending.pop()
        here, current = here.origin(current)
        equation, position = here.maker(current)
        if equation is not None and equation.primitive.name in ("add", "add_any"):
            pending += [(here, operand) for operand in equation.invars]
        elif not _is_zero(here, current):
            found += _terms_that_are_no_sum(here, current, equation, position)
    whole = [term for term in found if isinstance(term, Whole)]
    # What is made for each example anyway is added up by the program itself.
    if len(found) > 1 and (len(whole) > 1 or any(term.depends for term in whole)):
        return scope.whole(variable, "; ".join(dict.fromkeys(term.why for term in whole)))
    return tuple(found)


def _terms_that_are_no_sum(
    scope: Scope, variable: Any, equation: Equation | None, position: int
) -> Terms:
    if equation is not None:
        terms = _rule(scope, equation, position)
        return scope.whole(variable, equation.primitive.name) if terms is None else terms
    if scope.is_step and variable in scope.program.invars:
        return (Passed(scope.program.invars.index(variable)),)
    return scope.whole(variable, "an argument or a constant")


def _is_zero(scope: Scope, atom: Any) -> bool:
    scope, atom = scope.origin(atom)
    if isinstance(atom, Literal):
        return np.ndim(atom.val) == 0 and atom.val == 0
    equation, _ = scope.maker(atom)
    if equation is None or equation.primitive.name != "broadcast_in_dim":
        return False
    return _is_zero(scope, equation.invars[0])


def _rule(scope: Scope, equation: Equation, position: int) -> Terms | None:
    body = _programs.body_of(equation)
    if body is not None:
        return (_scan if body.is_scan else _call)(scope, equation, body, position)
    name = equation.primitive.name
    if name == "split":
        return _split(scope, equation, position)
    if name == "optimization_barrier":
        return terms_of(scope, equation.invars[position])
    return _RULES[name](scope, equation) if name in _RULES else None


# -- What makes products -------------------------------------------------------------------------


def _dot_general(scope: Scope, equation: Equation) -> Terms | None:
    lhs, rhs = equation.invars
    (lhs_summed, rhs_summed), (lhs_batch, rhs_batch) = equation.params["dimension_numbers"]
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
    return _product(
        scope.operand(lhs, lhs_axes),
        scope.operand(rhs, rhs_axes),
        (*batch, *free),
        precision=equation.params["precision"],
    )


def _product(lhs: Operand, rhs: Operand, out: Sequence[Axis], **options: Any) -> Terms | None:
    depends = lhs.depends or rhs.depends
    is_real = not any(
        jnp.issubdtype(operand.ref.variable.aval.dtype, np.complexfloating)
        for operand in (lhs, rhs)
    )
    return (Product(lhs, rhs, tuple(out), **options),) if depends and is_real else None


def _axes_of(variable: Any) -> list[Axis]:
    return [Axis(size) for size in shape_of(variable)]


def _scatter_add(scope: Scope, equation: Equation) -> Terms | None:
    """Of look-ups: updates times the rows of a matrix of zeros and ones."""
    operand, indices, updates = equation.invars
    numbers, mode = equation.params["dimension_numbers"], equation.params["mode"]
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
    tells = scope.operand(
        indices, looked_up, Squeezed(-1), Place(out[place].size, _is_clipped(mode))
    )
    new = _product(tells, scope.operand(updates, update_axes), out, one_hot=out[place])
    return None if new is None else terms_of(scope, operand) + new


def _is_clipped(mode: Any) -> bool:
    return jax.lax.GatherScatterMode.from_any(mode) == jax.lax.GatherScatterMode.CLIP


def _dynamic_update_slice(scope: Scope, equation: Equation) -> Terms | None:
    """Of a look-up of one row, at a place that is known only when it is computed."""
    operand, update, *starts = equation.invars
    out, update_axes = _axes_of(operand), _axes_of(update)
    smaller = [
        index
        for index, (one, other) in enumerate(zip(out, update_axes, strict=True))
        if one.size != other.size
    ]
    if len(smaller) != 1 or update_axes[smaller[0]].size != 1 or not _is_zero(scope, operand):
        return None
    (place,) = smaller
    rest = [axis for index, axis in enumerate(out) if index != place]
    tells = scope.operand(starts[place], (), Place(out[place].size, is_clipped=True))
    row = scope.operand(update, rest, Squeezed(place))
    return _product(tells, row, out, one_hot=out[place])


# More than this many entries of a window would be more slices than a compiler likes.
_LARGEST_WINDOW = 128


def _conv(scope: Scope, equation: Equation) -> Terms | None:
    """Of kernels: windows of the activations times what flows back."""
    lhs, rhs = equation.invars
    params = equation.params
    numbers = params["dimension_numbers"]
    groups = params["batch_group_count"]
    inputs, outputs, results = (
        [shape_of(variable)[axis] for axis in spec]
        for variable, spec in zip(
            (lhs, rhs, equation.outvars[0]),
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
    return _product(
        scope.operand(lhs, [feature, *places, *window, group, row], windows),
        scope.operand(rhs, [group, column, feature, *places], grouped),
        out,
        moves=moves,
        precision=params["precision"],
    )


# -- What keeps them -----------------------------------------------------------------------------


def _each(scope: Scope, atom: Any, change: Callable[[Product], Product | None]) -> Terms | None:
    """The terms of an operand, changed; None where one of them cannot be."""
    changed = []
    for term in terms_of(scope, atom):
        new = change(term) if isinstance(term, Product) else None
        if new is None:
            return None
        changed.append(new)
    return tuple(changed)


def _rev(scope: Scope, equation: Equation) -> Terms | None:
    move = Move("rev", (tuple(equation.params["dimensions"]),))
    return _each(scope, equation.invars[0], lambda term: term._replace(moves=(*term.moves, move)))


def _transpose(scope: Scope, equation: Equation) -> Terms | None:
    permutation = tuple(equation.params["permutation"])

    def change(term: Product) -> Product:
        if term.moves:
            return term._replace(moves=(*term.moves, Move("transpose", (permutation,))))
        return term._replace(out=tuple(term.out[axis] for axis in permutation))

    return _each(scope, equation.invars[0], change)


def _reshape(scope: Scope, equation: Equation) -> Terms | None:
    is_permuted = equation.params["dimensions"] is not None
    return None if is_permuted else _in_the_new_shape(scope, equation)


def _in_the_new_shape(scope: Scope, equation: Equation) -> Terms | None:
    shape = shape_of(equation.outvars[0])
    return _each(scope, equation.invars[0], lambda term: _reshaped(term, shape))


def _reshaped(term: Product, shape: tuple[int, ...]) -> Product:
    longer = [axis for axis in term.out if axis.size != 1]
    if term.moves or [axis.size for axis in longer] != [size for size in shape if size != 1]:
        return term._replace(moves=(*term.moves, Move("reshape", (shape,))))
    # Only axes of size one come and go.
    rest = iter(longer)
    return term._replace(out=tuple(next(rest) if size != 1 else Axis(1) for size in shape))


def _broadcast(scope: Scope, equation: Equation) -> Terms | None:
    before, after = shape_of(equation.invars[0]), shape_of(equation.outvars[0])
    is_same_size = math.prod(before) == math.prod(after)
    return _in_the_new_shape(scope, equation) if is_same_size else None


def _reduce_sum(scope: Scope, equation: Equation) -> Terms | None:
    summed = equation.params["axes"]

    def change(term: Product) -> Product | None:
        if term.moves or term.one_hot in [term.out[axis] for axis in summed]:
            return None
        kept = [axis for index, axis in enumerate(term.out) if index not in summed]
        return term._replace(out=tuple(kept))

    return _each(scope, equation.invars[0], change)


def _pad(scope: Scope, equation: Equation) -> Terms | None:
    operand, filling = equation.invars
    config = [tuple(map(int, edges)) for edges in equation.params["padding_config"]]
    shape = shape_of(operand)
    cuts = [
        (max(-low, 0), size - max(-high, 0), 1)
        for (low, high, _), size in zip(config, shape, strict=True)
    ]
    edges = [(max(low, 0), max(high, 0), step) for low, high, step in config]
    if not _is_zero(scope, filling):
        return None
    rows = zip(cuts, shape, edges, strict=True)
    if any(step and cut != (0, size, 1) for cut, size, (_, _, step) in rows):
        return None

    def change(term: Product) -> Product | None:
        cut = _cut(term, cuts, shape)
        return None if cut is None else _padded(cut, edges)

    return _each(scope, operand, change)


def _padded(term: Product, edges: Sequence[tuple[int, ...]]) -> Product:
    positions = [position for position, each in enumerate(edges) if any(each)]
    is_of_factors = not term.moves and all(_has_factors(term, position) for position in positions)
    if not is_of_factors:
        return term._replace(moves=(*term.moves, Move("pad", tuple(edges))))
    for position in positions:
        low, high, step = edges[position]
        size = term.out[position].size
        new = Axis(low + high + size + max(0, size - 1) * step)
        term = _changed_along(term, position, new, Pad, edges[position])
    return term


def _slice(scope: Scope, equation: Equation) -> Terms | None:
    params = equation.params
    strides = params["strides"] or [1] * len(params["start_indices"])
    cuts = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    shape = shape_of(equation.invars[0])
    return _each(scope, equation.invars[0], lambda term: _cut(term, cuts, shape))


def _split(scope: Scope, equation: Equation, position: int) -> Terms | None:
    (operand,), axis = equation.invars, equation.params["axis"]
    sizes = equation.params["sizes"]
    start = sum(sizes[:position])
    cuts = [(0, size, 1) for size in shape_of(operand)]
    cuts[axis] = (start, start + sizes[position], 1)
    return _each(scope, operand, lambda term: _cut(term, cuts, shape_of(operand)))


def _concatenate(scope: Scope, equation: Equation) -> Terms | None:
    axis = equation.params["dimension"]
    total = shape_of(equation.outvars[0])[axis]
    found: Terms = ()
    start = 0
    for operand in equation.invars:
        shape = shape_of(operand)
        edges = [(0, 0, 0)] * len(shape)
        edges[axis] = (start, total - start - shape[axis], 0)
        start += shape[axis]
        terms = _each(scope, operand, functools.partial(_padded, edges=edges))
        if terms is None:
            return None
        found += terms
    return found


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


def _mul(scope: Scope, equation: Equation) -> Terms | None:
    one, other = equation.invars
    by_other = _scaled(scope, one, other)
    return _scaled(scope, other, one) if by_other is None else by_other


def _div(scope: Scope, equation: Equation) -> Terms | None:
    return _scaled(scope, *equation.invars, jnp.reciprocal)


def _scaled(scope: Scope, atom: Any, by: Any, *preparations: Any) -> Terms | None:
    """The terms of an operand that is multiplied by a number."""
    # What has one value for all entries: a scalar, or one that was broadcast.
    here, number = scope.origin(by)
    while number.aval.ndim:
        equation, _ = here.maker(number)
        if equation is None or equation.primitive.name != "broadcast_in_dim":
            return None
        here, number = here.origin(equation.invars[0])
    factor = here.operand(number, (), *preparations)
    return _each(scope, atom, lambda term: term._replace(factors=(*term.factors, factor)))


def _neg(scope: Scope, equation: Equation) -> Terms | None:
    return _each(scope, equation.invars[0], lambda term: term._replace(scale=-term.scale))


def _same(scope: Scope, equation: Equation) -> Terms | None:
    return _each(scope, equation.invars[0], lambda term: term)


def _cast(scope: Scope, equation: Equation) -> Terms | None:
    # The sum is cast in the end, and a norm is taken of what was not rounded.
    is_float = jnp.issubdtype(equation.params["new_dtype"], np.floating)
    return _same(scope, equation) if is_float else None


_RULES: dict[str, Callable[[Scope, Equation], Terms | None]] = {
    "dot_general": _dot_general,
    "scatter-add": _scatter_add,
    "scatter_add": _scatter_add,
    "dynamic_update_slice": _dynamic_update_slice,
    "conv_general_dilated": _conv,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _in_the_new_shape,
    "broadcast_in_dim": _broadcast,
    "reduce_sum": _reduce_sum,
    "pad": _pad,
    "slice": _slice,
    "concatenate": _concatenate,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
    "convert_element_type": _cast,
    "copy": _same,
    "copy_p": _same,
    "sharding_constraint": _same,
    "rev": _rev,
}


# -- Bodies --------------------------------------------------------------------------------------


def _call(scope: Scope, equation: Equation, body: Body, position: int) -> Terms | None:
    inside = scope.inside(equation, body)
    terms = terms_of(inside, body.program.outvars[position])
    return tuple(_outwards(scope, inside, equation, term) for term in terms)


def _outwards(scope: Scope, inside: Scope, equation: Equation, term: Term) -> Term:
    """A term with operands of the body named by what they are outside."""
    outer = dict(zip(inside.program.invars, equation.invars, strict=True))

    def lift(operand: Operand) -> Operand:
        variable = operand.ref.variable
        if operand.ref.path == inside.path and is_variable(variable) and variable in outer:
            return scope.naming(operand, outer[variable])
        return operand

    return _with_operands(term, lift) if isinstance(term, Product) else term


def _with_operands(term: Product, change: Callable[[Operand], Operand]) -> Product:
    return term._replace(
        lhs=change(term.lhs), rhs=change(term.rhs), factors=tuple(map(change, term.factors))
    )


def _scan(scope: Scope, equation: Equation, body: Body, position: int) -> Terms | None:
    layout = _programs.scan_layout(equation, body)
    inside = scope.inside(equation, body)
    terms = terms_of(inside, body.program.outvars[position])
    passed = [term.position for term in terms if isinstance(term, Passed)]
    products = [term for term in terms if isinstance(term, Product)]
    if len(products) + len(passed) < len(terms):
        return None
    step = Axis(equation.params["length"])
    lifted = tuple(_stacked(scope, inside, equation, body, term, step) for term in products)
    if position < layout.carries:
        # The sum of a term over the steps, if nothing else is done to what is carried.
        if passed != [layout.consts + position]:
            return None
        return terms_of(scope, equation.invars[layout.consts + position]) + lifted
    if passed:
        return None
    return tuple(
        term._replace(
            out=(step, *term.out), moves=tuple(Move("mapped", move) for move in term.moves)
        )
        for term in lifted
    )


def _stacked(
    scope: Scope, inside: Scope, equation: Equation, body: Body, term: Product, step: Axis
) -> Product:
    """A term of one step as a product along all steps."""
    layout = _programs.scan_layout(equation, body)
    pairs = zip(inside.program.invars, equation.invars, strict=True)
    outer = {variable: (index, value) for index, (variable, value) in enumerate(pairs)}

    def lift(operand: Operand) -> Operand:
        if not is_variable(operand.ref.variable):
            return operand
        is_here = operand.ref.path == inside.path
        index, value = outer.get(operand.ref.variable, (None, None)) if is_here else (None, None)
        if index is not None and not layout.consts <= index < layout.consts + layout.carries:
            operand = scope.naming(operand, value)
            if index < layout.consts:
                return operand
        return operand._replace(stacked=(step, *operand.stacked))

    return _with_operands(term, lift)
