"""Runs a program of JAX in NumPy, one equation after the other.

So many small programs take little time. JAX compiles only what is not in the table below, such as
a convolution, and that once for each type of its operands.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

# What only calls a program, by the names that it had in any version of JAX.
CALLS = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "checkpoint",
    "remat",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}


def run(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of arrays."""
    program, out = jax.make_jaxpr(function, return_shape=True)(*args)
    with np.errstate(all="ignore"):  # Of values that a program does not select.
        results = _run(program, jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(out), results)


def _run(program: Any, args: Sequence[Any]) -> list[Any]:
    jaxpr, consts = (
        (program.jaxpr, program.consts) if hasattr(program, "consts") else (program, ())
    )
    inputs = map(_as_numpy, [*consts, *args])
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], inputs, strict=True))

    def read(atom: Any) -> Any:
        is_literal = isinstance(atom, core.Literal)
        return np.asarray(atom.val, atom.aval.dtype) if is_literal else values[atom]

    for equation in jaxpr.eqns:
        results = _results(equation, list(map(read, equation.invars)))
        values.update(zip(equation.outvars, results, strict=True))
    return list(map(read, jaxpr.outvars))


def _as_numpy(value: Any) -> Any:
    is_key = jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)
    return value if is_key else np.asarray(value)


def _results(equation: Any, operands: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name in CALLS:
        inside = next(key for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
        return _run(params[inside], operands)
    if name == "scan":
        return _scan(operands, equation)
    if name == "while":
        return _while(operands, params)
    if name == "cond":
        branches = params["branches"]
        return _run(branches[np.clip(int(operands[0]), 0, len(branches) - 1)], operands[1:])
    if name == "optimization_barrier":
        return operands
    if name not in NUMPY or not all(isinstance(each, np.ndarray) for each in operands):
        results = equation.primitive.bind(*operands, **params)
        return [
            _as_numpy(each)
            for each in (results if equation.primitive.multiple_results else [results])
        ]
    results = NUMPY[name](*operands, **params)
    if not equation.primitive.multiple_results:
        results = [results]
    types = [variable.aval for variable in equation.outvars]
    results = [np.asarray(each, of.dtype) for each, of in zip(results, types, strict=True)]
    assert [each.shape for each in results] == [of.shape for of in types], equation
    return results


def _scan(operands: Sequence[Any], equation: Any) -> list[Any]:
    params, inside = equation.params, equation.params["jaxpr"]

    def number_alike(outer: Any, inner: Any) -> int:
        """How many are not stacked. Their numbers have names only before jax 0.12."""
        rows = zip(outer, inner, strict=True)
        return sum(one.aval.shape == other.aval.shape for one, other in rows)

    middle = number_alike(equation.invars, inside.jaxpr.invars)
    first = middle - number_alike(equation.outvars, inside.jaxpr.outvars)
    consts, carries, stacks = operands[:first], operands[first:middle], operands[middle:]
    steps = range(params["length"])
    rows: dict[int, list[Any]] = {}
    for step in reversed(steps) if params["reverse"] else steps:
        results = _run(params["jaxpr"], [*consts, *carries, *(each[step] for each in stacks)])
        carries, rows[step] = results[: len(carries)], results[len(carries) :]
    columns = zip(*(rows[step] for step in steps), strict=True)
    return [*carries, *map(_stacked, columns)]


def _stacked(column: Sequence[Any]) -> Any:
    return np.stack(column) if isinstance(column[0], np.ndarray) else jax.numpy.stack(column)


def _while(operands: Sequence[Any], params: Any) -> list[Any]:
    first = params["cond_nconsts"]
    middle = first + params["body_nconsts"]
    carries = list(operands[middle:])
    while _run(params["cond_jaxpr"], [*operands[:first], *carries])[0]:
        carries = _run(params["body_jaxpr"], [*operands[first:middle], *carries])
    return carries


def _broadcast(x: Any, *, shape: Any, broadcast_dimensions: Any, **_: Any) -> Any:
    sizes = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, x.shape, strict=True):
        sizes[axis] = size
    return np.broadcast_to(x.reshape(sizes), shape)


def _slice(x: Any, *, start_indices: Any, limit_indices: Any, strides: Any) -> Any:
    steps = strides or [1] * x.ndim
    return x[tuple(map(slice, start_indices, limit_indices, steps))]


def _starts(x: Any, sizes: Sequence[int], starts: Sequence[Any]) -> tuple[slice, ...]:
    """Where a window lies, which is moved until all of it is inside."""
    rows = zip(x.shape, sizes, starts, strict=True)
    places = [min(max(int(start), 0), whole - size) for whole, size, start in rows]
    return tuple(slice(place, place + size) for place, size in zip(places, sizes, strict=True))


def _dynamic_slice(x: Any, *starts: Any, slice_sizes: Any) -> Any:
    return x[_starts(x, slice_sizes, starts)]


def _dynamic_update_slice(x: Any, new: Any, *starts: Any) -> Any:
    x = x.copy()
    x[_starts(x, new.shape, starts)] = new
    return x


def _pad(x: Any, value: Any, *, padding_config: Any) -> Any:
    if not x.ndim:
        return x
    rows = list(zip(x.shape, padding_config, strict=True))
    sizes = [size + max(0, size - 1) * step for size, (_, _, step) in rows]
    spread = np.full(sizes, value)
    spread[tuple(slice(None, None, step + 1) for _, _, step in padding_config)] = x
    out = np.pad(
        spread,
        [(max(low, 0), max(high, 0)) for low, high, _ in padding_config],
        constant_values=value,
    )
    ends = zip(out.shape, padding_config, strict=True)
    return out[tuple(slice(max(-low, 0), size - max(-high, 0)) for size, (low, high, _) in ends)]


def _dot_general(x: Any, y: Any, *, dimension_numbers: Any, **_: Any) -> Any:
    (of_x, of_y), (lead_x, lead_y) = dimension_numbers
    x = np.moveaxis(x, [*lead_x, *of_x], range(len(lead_x) + len(of_x)))
    y = np.moveaxis(y, [*lead_y, *of_y], range(len(lead_y) + len(of_y)))
    lead, summed = x.shape[: len(lead_x)], math.prod(x.shape[len(lead_x) :][: len(of_x)])
    rest_x, rest_y = (each.shape[len(lead_x) + len(of_x) :] for each in (x, y))
    x = x.reshape(*lead, summed, math.prod(rest_x)).swapaxes(-1, -2)
    return (x @ y.reshape(*lead, summed, math.prod(rest_y))).reshape((*lead, *rest_x, *rest_y))


def _gather(
    x: Any,
    places: Any,
    *,
    dimension_numbers: Any,
    slice_sizes: Any,
    mode: Any,
    fill_value: Any,
    **_: Any,
) -> Any:
    numbers = dimension_numbers
    batching = numbers.operand_batching_dims
    gone = (*numbers.collapsed_slice_dims, *batching)
    lead = places.shape[:-1]
    window = [size for axis, size in enumerate(slice_sizes) if axis not in gone]
    fill = np.nan if fill_value is None and np.issubdtype(x.dtype, np.inexact) else fill_value
    out = np.full((*lead, *window), fill or 0, x.dtype)
    for place in np.ndindex(*lead):
        starts = [0] * x.ndim
        for axis, start in zip(numbers.start_index_map, places[place], strict=True):
            starts[axis] = int(start)
        for axis, of in zip(batching, numbers.start_indices_batching_dims, strict=True):
            starts[axis] = place[of]
        if mode == lax.GatherScatterMode.CLIP or _is_inside(x, slice_sizes, starts):
            out[place] = x[_starts(x, slice_sizes, starts)].reshape(window)
    return np.moveaxis(out, range(len(lead), out.ndim), numbers.offset_dims)


def _scatter(combine: Any) -> Callable[..., Any]:
    def apply(
        x: Any, places: Any, new: Any, *, dimension_numbers: Any, mode: Any, **_: Any
    ) -> Any:
        numbers = dimension_numbers
        batching = numbers.operand_batching_dims
        gone = (*numbers.inserted_window_dims, *batching)
        inner = numbers.update_window_dims
        lead = [axis for axis in range(new.ndim) if axis not in inner]
        new = np.moveaxis(new, [*lead, *inner], range(new.ndim))
        left = iter(new.shape[len(lead) :])
        sizes = [1 if axis in gone else next(left) for axis in range(x.ndim)]
        x = x.copy()
        for place in np.ndindex(*places.shape[:-1]):
            starts = [0] * x.ndim
            rows = zip(numbers.scatter_dims_to_operand_dims, places[place], strict=True)
            for axis, start in rows:
                starts[axis] = int(start)
            for axis, of in zip(batching, numbers.scatter_indices_batching_dims, strict=True):
                starts[axis] = place[of]
            if mode == lax.GatherScatterMode.CLIP or _is_inside(x, sizes, starts):
                index = _starts(x, sizes, starts)
                x[index] = combine(x[index], new[place].reshape(sizes))
        return x

    return apply


def _is_inside(x: Any, sizes: Sequence[int], starts: Sequence[int]) -> bool:
    rows = zip(x.shape, sizes, starts, strict=True)
    return all(0 <= start <= whole - size for whole, size, start in rows)


def _reshape(x: Any, *, new_sizes: Any, dimensions: Any, **_: Any) -> Any:
    return (x if dimensions is None else np.transpose(x, dimensions)).reshape(new_sizes)


def _converted(x: Any, *, new_dtype: Any, **_: Any) -> Any:
    is_less = np.iscomplexobj(x) and not np.issubdtype(new_dtype, np.complexfloating)
    return (x.real if is_less else x).astype(new_dtype)


def _split(x: Any, *, sizes: Any, axis: int) -> list[Any]:
    return np.split(x, np.cumsum(sizes)[:-1], axis)


def _unstack(x: Any, *, axis: int, **_: Any) -> list[Any]:
    return list(np.moveaxis(x, axis, 0))


def _cumulative(function: Any) -> Callable[..., Any]:
    def apply(x: Any, *, axis: int, reverse: bool) -> Any:
        x = np.flip(x, axis) if reverse else x
        y = function(x, axis)
        return np.flip(y, axis) if reverse else y

    return apply


def _iota(*, dtype: Any, shape: Any, dimension: int, **_: Any) -> Any:
    return _broadcast(
        np.arange(shape[dimension], dtype=dtype), shape=shape, broadcast_dimensions=(dimension,)
    )


def _reduced(function: Any) -> Callable[..., Any]:
    return lambda x, *, axes, **_: function(x, axis=tuple(axes))


def _plain(function: Any) -> Callable[..., Any]:
    return lambda *operands, **_: function(*operands)


def _select(which: Any, *cases: Any) -> Any:
    which = np.broadcast_to(which, cases[0].shape)
    return np.choose(which.astype(int), cases)


NUMPY: dict[str, Callable[..., Any]] = {
    "abs": _plain(np.abs),
    "add": _plain(np.add),
    "add_any": _plain(np.add),
    "and": _plain(np.bitwise_and),
    "broadcast_in_dim": _broadcast,
    "ceil": _plain(np.ceil),
    "clamp": _plain(lambda low, x, high: np.clip(x, low, high)),
    "concatenate": lambda *x, dimension: np.concatenate(x, dimension),
    "convert_element_type": _converted,
    "copy": _plain(np.asarray),
    "copy_p": _plain(np.asarray),
    "cos": _plain(np.cos),
    "cumsum": _cumulative(np.cumsum),
    "div": lambda x, y, **_: x / y if np.issubdtype(x.dtype, np.inexact) else (x / y).astype(int),
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "eq": _plain(np.equal),
    "exp": _plain(np.exp),
    "expand_dims": lambda x, *, dimensions: np.expand_dims(x, dimensions),
    "floor": _plain(np.floor),
    "gather": _gather,
    "ge": _plain(np.greater_equal),
    "gt": _plain(np.greater),
    "integer_pow": lambda x, *, y: x**y if y >= 0 else 1 / x**-y,
    "iota": _iota,
    "is_finite": _plain(np.isfinite),
    "le": _plain(np.less_equal),
    "log": _plain(np.log),
    "log1p": _plain(np.log1p),
    "logistic": _plain(lambda x: 1 / (1 + np.exp(-x))),
    "lt": _plain(np.less),
    "max": _plain(np.maximum),
    "min": _plain(np.minimum),
    "mul": _plain(np.multiply),
    "ne": _plain(np.not_equal),
    "neg": _plain(np.negative),
    "not": _plain(np.invert),
    "or": _plain(np.bitwise_or),
    "pad": _pad,
    "pow": _plain(np.power),
    "reduce_and": _reduced(np.all),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "reduce_or": _reduced(np.any),
    "reduce_prod": _reduced(np.prod),
    "reduce_sum": _reduced(np.sum),
    "rem": _plain(np.fmod),
    "reshape": _reshape,
    "rev": lambda x, *, dimensions: np.flip(x, dimensions),
    "rsqrt": _plain(lambda x: 1 / np.sqrt(x)),
    "scatter": _scatter(lambda old, new: new),
    "scatter-add": _scatter(np.add),
    "scatter_add": _scatter(np.add),
    "select_n": _plain(_select),
    "sign": _plain(np.sign),
    "sin": _plain(np.sin),
    "slice": _slice,
    "split": _split,
    "sqrt": _plain(np.sqrt),
    "square": _plain(np.square),
    "squeeze": lambda x, *, dimensions: np.squeeze(x, tuple(dimensions)),
    "stack": lambda *x, axis, **_: np.stack(x, axis),
    "stop_gradient": _plain(np.asarray),
    "sub": _plain(np.subtract),
    "tan": _plain(np.tan),
    "tanh": _plain(np.tanh),
    "tile": lambda x, *, reps, **_: np.tile(x, reps),
    "transpose": lambda x, *, permutation: np.transpose(x, permutation),
    "unstack": _unstack,
}
